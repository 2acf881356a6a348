"""The examples of a help page, on the page of the reference that sphinx-click makes of a command."""

from __future__ import annotations

import click
from nf4_pipeline.cli.help import CommandWithExamples
from sphinx.application import Sphinx


def _add_examples(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    if isinstance(context.command, CommandWithExamples):
        for line, what in context.command.examples:
            lines += [what, "", ".. code-block:: sh", "", f"   {line}", ""]


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers it."""
    app.connect("sphinx-click-process-epilog", _add_examples)
    return {"parallel_read_safe": True}
