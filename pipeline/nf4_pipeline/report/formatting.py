"""Numbers -> text for people. Pure.

A number that JSON cannot hold (NaN, infinity) arrives as None or NaN, and is called by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, TypeGuard

from nf4_pipeline.fidelity.bootstrap import Interval

NOTHING: Final = "–"
NOT_FINITE: Final = "not finite"

_SPACE: Final = "\N{NO-BREAK SPACE}"
_CONTROLS: Final = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **{code: 0xFFFD for code in range(0x80, 0xA0)},
    **{code: 0xFFFD for code in range(0xD800, 0xE000)},
    # What turns the direction of all that follows, up to where a stranger likes.
    **{code: 0xFFFD for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))},
}


def number(value: float | None, digits: int = 4) -> str:
    """With `digits` significant digits, and no exponent between 0.0001 and a million million."""
    if not is_finite(value):
        return NOT_FINITE
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e12:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{_decimals(value, digits)}f}"


def percent(value: float | None) -> str:
    """A share of one, such as "97.31 %"."""
    return f"{value * 100:.2f}{_SPACE}%" if is_finite(value) else NOT_FINITE


def share(value: float) -> str:
    """A round share of one, such as "95 %"."""
    return f"{value * 100:g}{_SPACE}%"


def count(value: int | None) -> str:
    """With separators; a dash for None."""
    return NOTHING if value is None else f"{value:,}"


def size(value: float | None, *, binary: bool = False) -> str:
    """Bytes as a page shows them: four significant digits in the unit that fits.

    Args:
        value: bytes. A dash is shown for None and for 0, which means that there was none.
        binary: in GiB and so on, instead of GB.
    """
    if not value:
        return NOTHING
    for prefix, power in (("G", 3), ("M", 2), ("K" if binary else "k", 1)):
        unit = (1024 if binary else 1000) ** power
        if abs(value) >= unit:
            number_of_units = f"{value / unit:,.{_decimals(value / unit, 4)}f}"
            return f"{number_of_units}{_SPACE}{prefix}{'iB' if binary else 'B'}"
    return f"{value:,.0f}{_SPACE}B"


def plain_size(value: int, *, binary: bool = False) -> str:
    """Bytes as a terminal and Markdown show them: "4.010 GB", below one GB "20.53 MB".

    Args:
        value: bytes.
        binary: in GiB or MiB, of which the same size makes the same choice.
    """
    power, digits, prefix = (3, 3, "G") if value >= 10**9 else (2, 2, "M")
    if binary:
        return f"{value / 1024**power:.{digits}f} {prefix}iB"
    return f"{value / 1000**power:.{digits}f} {prefix}B"


def both_units(value: int) -> str:
    """Bytes in both kinds of unit: "4.010 GB = 3.735 GiB"."""
    return f"{plain_size(value)} = {plain_size(value, binary=True)}"


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


def one_in(agreement: float) -> str:
    """How many tokens differ where so large a share agrees: "one token in 21"."""
    differ = 1 - agreement
    if differ <= 0:
        return "no token"
    return f"one token in {1 / differ:,.0f}" if differ < 0.5 else f"{differ:.0%} of all tokens"


def bounds(figure: Interval, say: Callable[[float | None], str] = number) -> str:
    """The ends of an interval, each said by `say`."""
    low, high = say(figure.low), say(figure.high)
    return low if low == high == NOT_FINITE else f"{low} to {high}"


def interval(figure: Interval, digits: str = ".4g") -> str:
    """A figure and its interval in one line: "0.0213 [0.02, 0.0226]".

    Args:
        figure: if one of its bounds is not finite, the value stands alone.
        digits: format of each number.
    """
    if not is_finite(figure.value):
        return NOT_FINITE
    return f"{figure:{digits}}" if figure.is_finite else f"{figure.value:{digits}}"


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


def is_finite(value: float | None) -> TypeGuard[float]:
    """Whether a number is one that JSON can hold."""
    return value is not None and math.isfinite(value)


def _decimals(value: float, digits: int) -> int:
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))
