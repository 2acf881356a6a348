"""Help pages with examples, and what is said of a command line that cannot be read."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from nf4_pipeline.near_names import did_you_mean, near_names

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

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx  # of an option without its value, click says no command
            raise

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


def no_such_command(name: str, known: Sequence[str], rest: Sequence[str] = ()) -> str:
    """What to say of a word that is no command, and which one may have been meant.

    Args:
        name: the word.
        known: all commands.
        rest: what was typed behind it.
    """
    said = f"No such command {name!r}."
    if name == "help":
        page = f"nf4 {rest[0]} --help" if rest and rest[0] in known else "nf4 --help"
        return f"{said} A help page is an option: {page}"
    if name == "version":
        return f"{said} That is an option: nf4 --version"
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
    if isinstance(error, click.NoSuchOption) and context is not None:
        return f"No such option {error.option_name!r}.{_instead_of(error.option_name, context)}"
    if isinstance(error, click.BadOptionUsage) and context is not None:
        return said + _value_of(error.option_name, context)
    if context is not None and (taken := _taken_for_a_value(context)) is not None:
        return taken
    if isinstance(error, click.MissingParameter):
        command = context.command if context is not None else None
        if isinstance(error.param, click.Option) and error.param.help:
            said = f"{said.rstrip('.')}: {error.param.help}"
        if isinstance(command, CommandWithExamples):
            said = f"{said} For example: {command.examples[0][0]}"
    return said


def _options(context: click.Context) -> dict[str, click.Parameter]:
    """The options of a command, by each of their names."""
    params = context.command.get_params(context)
    return {
        name: param
        for param in params
        if isinstance(param, click.Option)
        for name in (*param.opts, *param.secondary_opts)
    }


def _instead_of(option: str, context: click.Context) -> str:
    """What to say behind the name of an option that there is not.

    Without dashes, which make all of them alike.
    """
    known = {name.lstrip("-"): name for name in _options(context) if name.startswith("--")}
    word = option.lstrip("-")
    longer = [known[name] for name in known if name.startswith(word)]
    near = longer[:3] or [known[name] for name in near_names(word, known)]
    if near:
        return f" Did you mean {' or '.join(map(repr, near))}?"
    if "recipe" in known and (table := _table_with(word.replace("-", "_"))) is not None:
        key = word.replace("-", "_")
        return (
            f" It is a key of a recipe: write {key} = … under [{table}] into a TOML file, and name "
            "that with --recipe."
        )
    return f" `{context.command_path} --help` lists those that there are."


def _table_with(key: str) -> str | None:
    """The table of a recipe that has a key; None if none has it."""
    from nf4_pipeline.recipe import TABLES, Recipe

    return next((name for name in TABLES if key in Recipe().table(name)), None)


def _value_of(option: str, context: click.Context) -> str:
    """What an option takes as its value, for one that was given none."""
    param = _options(context).get(option)
    if not isinstance(param, click.Option) or param.is_flag:
        return ""
    values = param.make_metavar(context)
    first, *others = values.split("|")
    such = f" For example: {option} {first}" if others and first.islower() else ""
    return f" It takes {values}.{such}"


def _taken_for_a_value(context: click.Context) -> str | None:
    """For an option that took the next one for its value; None if none did."""
    options = _options(context)
    for name, param in options.items():
        value = context.params.get(param.name or "")
        if isinstance(value, str | Path) and str(value).partition("=")[0] in options:
            return f"{name} has no value: {value} follows it.{_value_of(name, context)}"
    return None


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
