"""What a tokenizer adds to a text of its own accord."""

from __future__ import annotations

from typing import Any


def text_prefix(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts before a text; what it may put behind one is left out."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole: list[int] = tokenizer("a").input_ids
    starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[: next(starts, 0)]
