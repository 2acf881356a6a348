"""JSON documents as frozen dataclasses: the type hints are the codec.

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Tensor(Document):
        name: str
        shape: tuple[int, ...]
        module: str | None = optional()                     # left out of the JSON when it is None
        in_16_bit: int = field(metadata=key("16bit"))       # a key that is no identifier

    Tensor.from_json({"name": "w", "shape": [2, 3], "16bit": 4}).to_json()

Keys are the field names, in the order of the fields. A hint is another document, `tuple[T, ...]`,
`frozenset[str]` (sorted in JSON), `dict[str, T]` or `Mapping[str, T]`, `X | None`,
`Literal[...]`, `str`, `int`, `float`, `bool`, `Path` (text in JSON), or `Any` and `dict[str, Any]`
where foreign JSON is handed on as it is.
Numbers come back as they were: an int where a float is expected stays an int.

This checks shapes, not values: limits, patterns and the like are the JSON Schemas' affair.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

_KEY = "nf4_pipeline.key"
_OPTIONAL = "nf4_pipeline.optional"
_SCALARS: dict[Any, tuple[str, tuple[type, ...]]] = {
    str: ("a string", (str,)),
    int: ("an integer", (int,)),
    float: ("a number", (float, int)),
    bool: ("true or false", (bool,)),
    type(None): ("null", (type(None),)),
}


@cache
def schema_check(file: Path) -> Callable[[Any], object]:
    """What holds JSON values against a JSON Schema; made once, which takes a tenth of a second.

    It raises `fastjsonschema.JsonSchemaValueException`. Of the libraries for JSON Schema this is
    imported in 0.05 s; jsonschema takes 3 s where what it checks formats with is installed.

    Args:
        file: holds the schema.
    """
    import fastjsonschema

    check: Callable[[Any], object] = fastjsonschema.compile(json.loads(file.read_text("utf-8")))
    return check


class DocumentError(ValueError):
    """JSON has another shape than its document.

    Attributes:
        place: where, such as "tensors[3].shape"; "" is the document itself.
        problem: what was expected there, and what was there.
    """

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"{place or 'top level'}: {problem}")
        self.place = place
        self.problem = problem

    def inside(self, part: str) -> DocumentError:
        """The same error as seen from one level further out; `part` is a key or an "[index]"."""
        joint = "." if self.place and not self.place.startswith("[") else ""
        return DocumentError(f"{part}{joint}{self.place}", self.problem)


def optional(name: str | None = None) -> Any:
    """A field that is None by default and is then left out of the JSON.

    Args:
        name: the JSON key, if it is not the field's name.
    """
    return field(default=None, metadata={_OPTIONAL: True} | (key(name) if name else {}))


def key(name: str) -> dict[str, str]:
    """Metadata of a field whose JSON key is not its name: `field(metadata=key("16bit"))`."""
    return {_KEY: name}


class Document:
    """What frozen dataclasses that stand for JSON objects derive from."""

    __slots__ = ()

    refuse_unknown_keys: ClassVar[bool] = False
    """Whether `from_json` refuses keys that no field has; else it ignores them."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, keys in the order of the fields."""
        return {
            entry.key: _plain(value)
            for entry in _entries(type(self))
            if (value := getattr(self, entry.name)) is not None or not entry.optional
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Builds the document from what `json.loads` gives.

        Raises:
            DocumentError: a key is missing, a value has another type than its field, or a key
                is unknown and the class refuses such keys.
        """
        if not isinstance(value, dict):
            raise _wrong("an object", value)
        entries = _entries(cls)
        arguments = {}
        for entry in entries:
            if entry.key in value:
                try:
                    arguments[entry.name] = entry.read(value[entry.key])
                except DocumentError as error:
                    raise error.inside(entry.key) from None
            elif entry.required:
                raise DocumentError(entry.key, f"expected {entry.expected}, got nothing")
        if cls.refuse_unknown_keys:
            known = {entry.key for entry in entries}
            for name in value:
                if name not in known:
                    raise DocumentError(name, "unknown key")
        return cls(**arguments)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One field of a document: its name, its key in JSON, and how its value is read."""

    name: str
    key: str
    required: bool
    optional: bool
    expected: str
    read: Callable[[Any], Any]


_entries_of: dict[type, tuple[_Entry, ...]] = {}


def _entries(cls: type) -> tuple[_Entry, ...]:
    """The fields of a document, their hints looked up once per class."""
    known = _entries_of.get(cls)
    if known is None:
        known = _entries_of[cls] = _look_up(cls)
    return known


def _look_up(cls: type) -> tuple[_Entry, ...]:
    hints = get_type_hints(cls)
    return tuple(
        _Entry(
            name=item.name,
            key=item.metadata.get(_KEY, item.name),
            required=item.default is MISSING and item.default_factory is MISSING,
            optional=item.metadata.get(_OPTIONAL, False),
            expected=_expected(hints[item.name]),
            read=_reader(hints[item.name]),
        )
        for item in fields(cls)
    )


def _plain(value: Any) -> Any:
    if type(value) in _SCALARS:
        return value
    if isinstance(value, Document):
        return value.to_json()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _wrong(expected: str, value: Any) -> DocumentError:
    text = repr(value)
    got = {dict: "an object", list: "a list", type(None): "null"}.get(type(value))
    return DocumentError("", f"expected {expected}, got {got or text[:80]}")


def _expected(hint: Any) -> str:
    """A hint in the words of JSON."""
    origin = get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(choice) for choice in get_args(hint))
    if hint in _SCALARS:
        return _SCALARS[hint][0]
    if origin in (tuple, frozenset):
        return "a list"
    return {Path: "a path", Any: "a value"}.get(hint, "an object")


def _reader(hint: Any) -> Callable[[Any], Any]:
    """How a value of this hint is read from JSON.

    Raises:
        TypeError: the hint is none that a document may have.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: value
    if hint in _SCALARS:
        return _scalar_reader(hint)
    if hint is Path:
        return lambda value: Path(_scalar_reader(str)(value))
    if isinstance(hint, type) and issubclass(hint, Document):
        return hint.from_json
    if origin is Literal:
        return _literal_reader(hint)
    if origin in (Union, types.UnionType):
        return _union_reader(hint)
    if origin is tuple and len(parts) == 2 and parts[1] is ...:
        return _list_reader(_reader(parts[0]))
    if origin is frozenset and parts == (str,):
        read = _list_reader(_reader(str))
        return lambda value: frozenset(read(value))
    if origin in (dict, Mapping) and parts[0] is str:
        return _object_reader(_reader(parts[1]))
    raise TypeError(f"no document may have a field of the type {hint!r}")


def _scalar_reader(kind: type) -> Callable[[Any], Any]:
    expected, accepted = _SCALARS[kind]

    def read(value: Any) -> Any:
        # By the exact type: `True` is an int to isinstance, and no number in JSON.
        if type(value) not in accepted:
            raise _wrong(expected, value)
        return value

    return read


def _literal_reader(hint: Any) -> Callable[[Any], Any]:
    choices = get_args(hint)

    def read(value: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise _wrong(_expected(hint), value)
        return value

    return read


def _union_reader(hint: Any) -> Callable[[Any], Any]:
    """`X | None`; of other unions, the first choice that reads the value."""
    choices = [choice for choice in get_args(hint) if choice is not type(None)]
    nullable = len(choices) < len(get_args(hint))
    readers = [_reader(choice) for choice in choices]

    def read(value: Any) -> Any:
        if value is None and nullable:
            return None
        for reader in readers[:-1]:
            try:
                return reader(value)
            except DocumentError:
                continue
        try:
            return readers[-1](value)
        except DocumentError as error:
            raise error if error.place else _wrong(_expected(hint), value) from None

    return read


def _list_reader(item: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, list):
            raise _wrong("a list", value)
        done: list[Any] = []
        try:
            for part in value:
                done.append(item(part))  # how many are done is the place
        except DocumentError as error:
            raise error.inside(f"[{len(done)}]") from None
        return tuple(done)

    return read


def _object_reader(item: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _wrong("an object", value)
        done = {}
        for name, part in value.items():
            try:
                done[name] = item(part)
            except DocumentError as error:
                raise error.inside(f"[{name!r}]") from None
        return done

    return read
