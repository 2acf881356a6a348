"""Names against patterns with `*`, in time that grows with the name and not with its powers.

Both may be a stranger's: names are a checkpoint's, patterns those of a manifest's recipe. A regular
expression of six `.*` takes for ever on a name of a thousand letters, and no signal ends it.
"""

from __future__ import annotations


def fits(pattern: str, text: str, *, least: int = 0) -> bool:
    """Whether a pattern names all of a text.

    Args:
        pattern: each `*` in it stands for any characters.
        text: the name.
        least: how many characters a `*` stands for at least.
    """
    first, *rest = pattern.split("*")
    if not rest:
        return text == pattern
    if not text.startswith(first):
        return False
    place = len(first)
    for part in rest[:-1]:
        # The first place that does is the best one: it leaves most of the text to what follows.
        found = text.find(part, place + least)
        if found < 0:
            return False
        place = found + len(part)
    return text.endswith(rest[-1]) and len(text) - len(rest[-1]) >= place + least
