"""What GitHub Actions reads: workflow commands on stdout, and the files of a step. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from nf4_pipeline.ci.report import Annotation
from nf4_pipeline.printable import printable

_SHOWN: Final = 10
"""Annotations of a level that GitHub shows of one step."""

_LARGEST_SUMMARY: Final = 1_000_000
"""Bytes; GitHub shows none that is larger than 1 MiB."""


def annotation_commands(annotations: Sequence[Annotation]) -> list[str]:
    """Lines that make annotations of themselves; of those that would not be shown, their number."""
    lines = []
    for level in ("error", "warning"):
        of_level = [each for each in annotations if each.level == level]
        shown = of_level if len(of_level) <= _SHOWN else of_level[: _SHOWN - 1]
        lines += [_command(level, each.title, each.message) for each in shown]
        if more := len(of_level) - len(shown):
            lines.append(_command(level, "nf4", f"{more} more: see the summary."))
    return lines


def output_lines(outputs: Mapping[str, str]) -> str:
    """What is added to the file that GITHUB_OUTPUT names: one line a value, whatever is in it."""
    return "".join(f"{name}={printable(value)}\n" for name, value in outputs.items())


def step_summary(markdown: str) -> str:
    """What is added to the file that GITHUB_STEP_SUMMARY names."""
    raw = markdown.encode()
    if len(raw) <= _LARGEST_SUMMARY:
        return markdown
    return raw[:_LARGEST_SUMMARY].decode(errors="ignore") + "\n\n…\n"


def _command(level: str, title: str, message: str) -> str:
    """A workflow command. In a property, the marks that end one are escaped as well."""
    name = _escaped(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={name}::{_escaped(message)}"


def _escaped(text: str) -> str:
    return printable(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
