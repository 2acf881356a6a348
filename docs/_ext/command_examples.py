"""What sphinx-click leaves out of a command: its examples; and stars that are no emphasis."""

from __future__ import annotations

import re

import click
from nf4_pipeline.cli.help import CommandWithExamples
from sphinx.application import Sphinx


def _add_examples(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    if isinstance(context.command, CommandWithExamples):
        for line, what in context.command.examples:
            lines += [what, "", ".. code-block:: sh", "", f"   {line}", ""]


def _escape_stars(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    lines[:] = [re.sub(r"(?<=[\s_\w])\*(?=[.\w])", r"\\*", line) for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers them."""
    app.connect("sphinx-click-process-epilog", _add_examples)
    app.connect("sphinx-click-process-options", _escape_stars)
    return {"parallel_read_safe": True}
