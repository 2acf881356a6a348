"""Text of strangers made fit for a terminal: what controls it is shown instead of sent."""

from __future__ import annotations

from typing import Final
from unicodedata import category

LONGEST: Final = 4_000
"""Characters that are kept by default: more than any message needs."""

_IN_PROSE: Final = "\n\t\u200c\u200d"


def printable(text: str, limit: int = LONGEST, *, lines: bool = False) -> str:
    r"""Writes what is not printable as `\x1b` or `\u202e`, and cuts what is too long.

    Not printable are control characters, marks of writing direction, half characters (surrogates),
    code points without a character, and spaces other than the usual one.

    Args:
        text: from a Hub, a checkpoint, a template, a file name.
        limit: characters of the text to keep; "…" stands for the rest.
        lines: as in prose, line breaks and tabs stay, and so do other spaces than the usual one
            and what joins letters in Persian, in Hindi and in emoji.
    """
    cut = text if len(text) <= limit else text[:limit] + "…"
    if cut.isprintable():
        return cut
    return "".join(char if _is_harmless(char, lines) else _shown(char) for char in cut)


def _is_harmless(char: str, lines: bool) -> bool:
    return char.isprintable() or (lines and (char in _IN_PROSE or category(char) == "Zs"))


def _shown(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
