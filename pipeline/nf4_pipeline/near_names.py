"""Names that somebody may have meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str], before: str = "") -> str:
    """A question with the names that are near, after a space; nothing if none is.

    Args:
        name: what was said.
        known: what could have been.
        before: what stands before each of them, such as a folder.
    """
    by_folded = {item.casefold(): item for item in known}
    near = get_close_matches(name.casefold()[:200], by_folded, n=3)
    if not near:
        return ""
    names = [repr(before + by_folded[item]) for item in near]
    return f" Did you mean {' or '.join(names)}?"
