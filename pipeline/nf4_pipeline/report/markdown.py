"""Words of others in Markdown: shown as they are, and nothing that a renderer acts on. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from nf4_pipeline.printable import printable


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table; its cells are Markdown already."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def cell(words: str) -> str:
    """Words of others inside a table."""
    line = " ".join(words.split())
    return plain(line if len(line) <= 160 else line[:159] + "…")


# What Markdown, HTML or a formula ($) begins with; an underscore only at the edge of a word.
_MARKS: Final = re.compile(r"[&<>|`\[\]*~$\\]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|^[#+=-]")
_NAMED: Final = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def plain(words: str) -> str:
    """Words of others, as words: one line, with nothing for Markdown or HTML to act on."""
    line = printable(" ".join(words.split()))
    return _MARKS.sub(lambda mark: _NAMED.get(mark[0], f"&#{ord(mark[0])};"), line)


def code(words: str) -> str:
    """A name as code; where backticks in it would end that, as words."""
    is_code = words.strip() and not set(words) & set("`\r\n")
    return f"`{printable(words)}`" if is_code else plain(words)
