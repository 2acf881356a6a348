"""Untrusted JSON: limited before it is parsed, so that a small text cannot take much memory."""

from __future__ import annotations

import json
import re
from math import isfinite
from typing import Any, Final

MAX_CONTAINERS: Final = 500_000
MAX_KEYS: Final = 500_000
MAX_VALUES: Final = 2_000_000
MAX_DEPTH: Final = 64
MAX_DIGITS: Final = 40
"""Of a whole number: tokenizers say 10**30 where they mean no limit, and no float overflows."""

_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes, *, finite: bool = False) -> Any:
    """Parses a text that may have been made to harm.

    A list or an object takes some 60 bytes and more in memory for two in the text, and so do the
    names of an object; they are counted in the text first, where those inside of strings count too.

    Args:
        raw: the text.
        finite: refuse numbers that JSON does not have, such as NaN and 1e999.

    Raises:
        ValueError: the text is not UTF-8, is not JSON, has a key twice, or exceeds the limits; the
            error says which.
    """
    if raw.count(b"[") + raw.count(b"{") > MAX_CONTAINERS:
        raise ValueError(f"it holds more than {MAX_CONTAINERS:,} lists and objects")
    if raw.count(b":") > MAX_KEYS:
        raise ValueError(f"it holds more than {MAX_KEYS:,} keys")
    if raw.count(b",") > MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES:,} values")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_int=_whole,
            parse_float=_finite if finite else float,
            parse_constant=_no_number if finite else float,
        )
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    if _SURROGATE.search(raw) and not _is_text(value):
        raise ValueError("it holds half a character")
    if _is_deep(value):
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    return value


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number in it has {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not isfinite(number):
        raise ValueError(f"a number in it is larger than any: {digits[:20]}")
    return number


def _no_number(name: str) -> float:
    raise ValueError(f"{name} stands in it, which is no number of JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name[:80]!r} stands in it twice")
            seen.add(name)
    return value


def _is_text(value: Any) -> bool:
    """False if a string of a value cannot be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _is_deep(value: Any) -> bool:
    """True if lists and objects are nested too deep; looks at one level at a time."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += [v for v in item.values() if isinstance(v, dict | list)]
            elif isinstance(item, list):
                inner += [v for v in item if isinstance(v, dict | list)]
        if not inner:
            return False
        level = inner
    return True
