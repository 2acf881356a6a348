"""Markdown that holds words of strangers: no mark in them acts on what stands around. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from nf4_pipeline.printable import printable


def folded(summary: str, content: str) -> str:
    """What is long, behind a line that opens it."""
    return f"<details><summary>{summary}</summary>\n\n{content}\n\n</details>"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table; what stands in its cells has passed `in_cell`, or holds no mark."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def in_cell(text: str) -> str:
    """Words of others inside a table."""
    line = " ".join(text.split())
    return in_text(line if len(line) <= 160 else line[:159] + "…")


# What Markdown, HTML or a formula ($) begins with; an underscore only at the edge of a word.
_MARKS: Final = re.compile(r"[&<>|`\[\]*~$\\]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|^[#+=-]")
_NAMED: Final = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def in_text(text: str) -> str:
    """Words of others, as words: one line, with nothing for Markdown or HTML to act on."""
    line = printable(" ".join(text.split()))
    return _MARKS.sub(lambda mark: _NAMED.get(mark[0], f"&#{ord(mark[0])};"), line)


def code(text: str) -> str:
    """A name as code; where backticks in it would end that, as words."""
    return (
        f"`{printable(text)}`" if text.strip() and not set(text) & set("`\r\n") else in_text(text)
    )
