"""The expressions of GitHub Actions (`${{ }}`), as far as workflows here use them.

An expression or a function that is not known is an error, never an empty text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

_TOKEN: Final = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?)|(?P<text>'(?:[^']|'')*')"
    r"|(?P<operator>&&|\|\||==|!=|<=|>=|[<>!().,\[\]])|(?P<name>[A-Za-z_][\w-]*))"
)
_EMBEDDED: Final = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)
STATUS: Final = ("success", "failure", "cancelled", "always")


class ExpressionError(ValueError):
    """An expression that cannot be evaluated."""


def evaluate(expression: str, contexts: Mapping[str, Any]) -> Any:
    """The value of what stands between `${{` and `}}`.

    Args:
        expression: its text.
        contexts: by name; one that can be called is a function.
    """
    parser = _Parser(expression, contexts)
    value = parser.either()
    parser.expect_end()
    return value


def fill_in(text: Any, contexts: Mapping[str, Any]) -> Any:
    """A value of a workflow with every expression in its texts replaced."""
    if isinstance(text, Mapping):
        return {name: fill_in(value, contexts) for name, value in text.items()}
    if isinstance(text, list):
        return [fill_in(value, contexts) for value in text]
    if not isinstance(text, str):
        return text
    if (whole := _EMBEDDED.fullmatch(text.strip())) and text.count("${{") == 1:
        return evaluate(whole[1], contexts)
    return _EMBEDDED.sub(lambda found: as_text(evaluate(found[1], contexts)), text)


def holds(condition: Any, contexts: Mapping[str, Any]) -> bool:
    """Whether an `if:` holds; one that names no status also asks for success."""
    if condition is None:
        return is_true(contexts["success"]())
    text = str(condition).strip()
    if whole := _EMBEDDED.fullmatch(text):
        text = whole[1]
    names_status = any(re.search(rf"\b{name}\(", text) for name in STATUS)
    return is_true(evaluate(text, contexts)) and (names_status or is_true(contexts["success"]()))


def is_true(value: Any) -> bool:
    """As GitHub has it: 0, "", false and null are not."""
    return value not in (0, "", False, None)


def as_text(value: Any) -> str:
    """A value inside of a text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, dict | list):
        raise ExpressionError(f"{value!r} is no text")
    return str(value)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, str) and isinstance(other, str):
        return one.casefold() == other.casefold()
    if type(one) is type(other):
        return bool(one == other)
    return _as_number(one) == _as_number(other)


def _as_number(value: Any) -> float:
    if value is None or value == "":
        return 0.0
    if isinstance(value, bool | int | float):
        return float(value)
    try:
        return float(value)
    except ValueError:
        return float("nan")


_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "fromjson": json.loads,
    "tojson": json.dumps,
    "contains": lambda where, what: what in where,
    "startswith": lambda text, start: text.startswith(start),
    "format": lambda text, *values: text.format(*map(as_text, values)),
}


class _Parser:
    """By recursive descent; both sides of `&&` and `||` are evaluated, which changes no value."""

    def __init__(self, text: str, contexts: Mapping[str, Any]) -> None:
        self.text = text.strip()
        self.contexts = contexts
        self.tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(self.text):
            found = _TOKEN.match(self.text, at)
            if found is None:
                raise ExpressionError(f"cannot read {self.text!r} at {self.text[at:]!r}")
            kind = str(found.lastgroup)
            self.tokens.append((kind, found[kind]))
            at = found.end()

    def either(self) -> Any:
        value = self.both()
        while self._take("||"):
            other = self.both()
            value = value if is_true(value) else other
        return value

    def both(self) -> Any:
        value = self.compared()
        while self._take("&&"):
            other = self.compared()
            value = other if is_true(value) else value
        return value

    def compared(self) -> Any:
        value = self.unary()
        for operator, call in (
            ("==", _equal),
            ("!=", lambda a, b: not _equal(a, b)),
            (">", lambda a, b: _as_number(a) > _as_number(b)),
            ("<", lambda a, b: _as_number(a) < _as_number(b)),
        ):
            if self._take(operator):
                return call(value, self.unary())
        return value

    def unary(self) -> Any:
        return not is_true(self.unary()) if self._take("!") else self.primary()

    def primary(self) -> Any:
        if not self.tokens:
            raise ExpressionError(f"{self.text!r} ends too early")
        kind, text = self.tokens.pop(0)
        if kind == "number":
            return float(text)
        if kind == "text":
            return text[1:-1].replace("''", "'")
        if text == "(":
            value = self.either()
            self._expect(")")
            return value
        if kind != "name":
            raise ExpressionError(f"{text!r} stands where a value must, in {self.text!r}")
        if text in ("true", "false", "null"):
            return {"true": True, "false": False, "null": None}[text]
        if self._take("("):
            return self._call(text)
        if text not in self.contexts:
            raise ExpressionError(f"there is no context {text!r} for {self.text!r}")
        value = self.contexts[text]
        while self._take("."):
            name = self.tokens.pop(0)[1]
            if not isinstance(value, Mapping):
                raise ExpressionError(f"{text} has no {name!r} in {self.text!r}")
            value = value.get(name)
            if value is None:
                value = {} if self.tokens[:1] == [("operator", ".")] else None
        return value

    def _call(self, name: str) -> Any:
        values = []
        while not self._take(")"):
            values.append(self.either())
            self._take(",")
        function = self.contexts.get(name) if name in STATUS else _FUNCTIONS.get(name.lower())
        if function is None:
            raise ExpressionError(f"there is no function {name!r}")
        return function(*values)

    def expect_end(self) -> None:
        if self.tokens:
            raise ExpressionError(f"{self.tokens[0][1]!r} is left over of {self.text!r}")

    def _take(self, operator: str) -> bool:
        if self.tokens and self.tokens[0] == ("operator", operator):
            self.tokens.pop(0)
            return True
        return False

    def _expect(self, operator: str) -> None:
        if not self._take(operator):
            raise ExpressionError(f"{operator!r} is missing in {self.text!r}")
