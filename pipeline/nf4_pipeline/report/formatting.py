"""Numbers -> text for people. Pure.

A number that JSON cannot hold (NaN, infinity) arrives as None, and is called by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, TypeGuard

NOTHING: Final = "–"
NOT_FINITE: Final = "not finite"

_SPACE: Final = "\N{NO-BREAK SPACE}"
_CONTROLS: Final = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **{code: 0xFFFD for code in range(0x80, 0xA0)},
    **{code: 0xFFFD for code in range(0xD800, 0xE000)},
}


def number(value: float | None, digits: int = 4) -> str:
    """With `digits` significant digits, and no exponent between 0.0001 and a million million."""
    if not _finite(value):
        return NOT_FINITE
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e12:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{_decimals(value, digits)}f}"


def percent(value: float | None) -> str:
    """A share of one, such as "97.31 %"."""
    return f"{value * 100:.2f}{_SPACE}%" if _finite(value) else NOT_FINITE


def share(value: float) -> str:
    """A round share of one, such as "95 %"."""
    return f"{value * 100:g}{_SPACE}%"


def count(value: int | None) -> str:
    """With separators; a dash for None."""
    return NOTHING if value is None else f"{value:,}"


def size(value: float | None) -> str:
    """Bytes in decimal units; a dash for None and for 0, which means that there was none."""
    if not value:
        return NOTHING
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= one:
            return f"{value / one:,.{_decimals(value / one, 4)}f}{_SPACE}{unit}"
    return f"{value:,.0f}{_SPACE}B"


def binary_size(value: float) -> str:
    """Bytes in binary units."""
    for unit, one in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= one:
            return f"{value / one:,.{_decimals(value / one, 4)}f}{_SPACE}{unit}"
    return f"{value:,.0f}{_SPACE}B"


def seconds(value: float | None) -> str:
    """A time; a dash for None."""
    if value is None:
        return NOTHING
    if abs(value) >= 120:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes}{_SPACE}min {rest}{_SPACE}s"
    if abs(value) >= 1 or value == 0:
        return f"{value:.1f}{_SPACE}s"
    return f"{number(value * 1e3, 3)}{_SPACE}ms"


def bounds(
    interval: Mapping[str, float | None], say: Callable[[float | None], str] = number
) -> str:
    """The interval of {"value", "low", "high"}, each end said by `say`."""
    low, high = say(interval["low"]), say(interval["high"])
    return low if low == high == NOT_FINITE else f"{low} to {high}"


def visible(text: str) -> str:
    """Text as it is, but for what HTML cannot carry: controls become their pictures (U+2400 on).

    Character for character, so that positions in `text` stay right.
    """
    return text.translate(_CONTROLS)


def label(text: str, limit: int) -> str:
    """A name as one line of at most `limit` characters: what is too long loses its middle."""
    line = " ".join(visible(text).split())
    if len(line) <= limit:
        return line
    tail = (limit - 1) // 2
    return f"{line[: limit - 1 - tail]}…{line[len(line) - tail :]}"


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _decimals(value: float, digits: int) -> int:
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))
