"""Help pages with examples, and what is said of a command line that cannot be read."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from nf4_pipeline.near_names import did_you_mean

Examples = Sequence[tuple[str, str]]
"""A line to type, and what it does."""

_OTHER_WORDS: Final = {
    "chat": "prompt",
    "clean": "status",
    "compare": "verify",
    "convert": "build",
    "diff": "verify",
    "export": "serialize",
    "fetch": "download",
    "generate": "prompt",
    "info": "inspect",
    "list": "status",
    "ls": "status",
    "make": "build",
    "pack": "serialize",
    "publish": "push",
    "pull": "download",
    "run": "prompt",
    "save": "serialize",
    "show": "inspect",
    "test": "verify",
    "upload": "push",
    "validate": "verify",
}
"""What other programs call a thing, and the command that does it here."""

_MOST: Final = 100  # names that a completion offers


class CommandWithExamples(click.Command):
    """A command whose help page ends with examples.

    Args:
        examples: two or more.
        values: as `click.Command` takes them.
    """

    def __init__(self, *args: Any, examples: Examples, **values: Any) -> None:
        super().__init__(*args, **values)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(self.examples, formatter)


def write_examples(examples: Examples, formatter: click.HelpFormatter) -> None:
    """Writes the section of a help page that has examples."""
    with formatter.section("Examples"):
        for line, what in examples:
            formatter.write(f"{'':{formatter.current_indent}}{line}\n")
            formatter.indent()
            formatter.write_text(what)
            formatter.dedent()


def no_such_command(name: str, known: Sequence[str]) -> str:
    """What to say of a word that is no command, and which one may have been meant.

    Args:
        name: the word.
        known: all commands.
    """
    said = f"No such command {name!r}."
    if (other := _OTHER_WORDS.get(name.casefold())) is not None:
        return f"{said} Did you mean {other!r}?"
    if near := did_you_mean(name, known):
        return said + near
    if name == "sample" or "/" in name or Path(name).is_dir():
        return f"{said} To build that model: nf4 build {shlex.quote(name)}"
    return f"{said} `nf4 --help` lists all commands."


def usage_message(error: click.ClickException) -> str:
    """What click says, and for something that is missing an example that has it."""
    said = error.format_message()
    context = getattr(error, "ctx", None)
    if isinstance(error, click.NoSuchOption) and context is not None and not error.possibilities:
        known = [name for param in context.command.get_params(context) for name in param.opts]
        near = [name for name in known if name.startswith(error.option_name)]
        if near:
            return f"{said} Did you mean {' or '.join(map(repr, near[:3]))}?"
        return f"{said} `{context.command_path} --help` lists those that there are."
    if isinstance(error, click.MissingParameter):
        command = context.command if context is not None else None
        if isinstance(error.param, click.Option) and error.param.help:
            said = f"{said.rstrip('.')}: {error.param.help}"
        if isinstance(command, CommandWithExamples):
            said = f"{said} For example: {command.examples[0][0]}"
    return said


def complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> Any:
    """What a shell offers where a model or a build is wanted: the sample, and folders."""
    start = Path(incomplete or ".")
    folder = start if incomplete.endswith("/") or not incomplete else start.parent
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        inside = []
    names = ["sample", *(f"{path}/" for path in inside if not path.name.startswith("."))]
    offered = [name for name in names if name.startswith(incomplete) and name.isprintable()]
    return [CompletionItem(name) for name in offered[:_MOST]]
