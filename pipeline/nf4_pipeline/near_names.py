"""Names that somebody may have meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def near_names(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> list[str]:
    """Up to three of the known names that are near, the nearest first; case does not count.

    Args:
        name: what was said.
        known: what could have been.
        cutoff: how much of both must be alike, from 0 to 1.
    """
    by_folded = {item.casefold(): item for item in known}
    near = get_close_matches(name.casefold()[:200], by_folded, n=3, cutoff=cutoff)
    return [by_folded[item] for item in near]


def did_you_mean(name: str, known: Iterable[str], before: str = "") -> str:
    """A question with the names that are near, after a space; nothing if none is.

    Args:
        name: what was said.
        known: what could have been.
        before: what stands before each of them, such as a folder.
    """
    near = [repr(before + item) for item in near_names(name, known)]
    return f" Did you mean {' or '.join(near)}?" if near else ""
