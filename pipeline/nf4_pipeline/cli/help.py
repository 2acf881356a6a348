"""Help pages with examples, and what is said of a command line that cannot be read."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from nf4_pipeline.checkpoint.model_name import WANTED
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

_OTHER_OPTIONS: Final = {
    "calib": "--calibrate",
    "calibration": "--calibrate",
    "cuda": "--device",
    "dataset": "--calibrate",
    "force": "--replace",
    "gpu": "--device",
    "jobs": "--workers",
    "max-tokens": "--max-new-tokens",
    "num-workers": "--workers",
    "out": "--build-dir",
    "output": "--build-dir",
    "output-dir": "--build-dir",
    "overwrite": "--replace",
    "repo": "--repo-id",
    "shard-size": "--max-shard-size",
    "threads": "--workers",
    "trust-pickle": "--allow-pickle",
}
"""What other programs call an option, and the one that a command may have for it."""

_ALWAYS: Final = (
    *("4bit", "bits", "load-in-4bit", "nf4", "quant-type", "quantization", "wbits"),
    *("block-size", "double-quant", "group-size", "use-double-quant"),
)
"""Options of other programs for what is always so here."""

_ELSEWHERE: Final = {
    "hf-token": "A token comes from the environment (HF_TOKEN) or from `hf auth login`.",
    "token": "A token comes from the environment (HF_TOKEN) or from `hf auth login`.",
    "trust-remote-code": "Code that comes with a model is never run. Leave it out.",
    "yes": "Nothing is ever asked. Leave it out.",
}
"""Options of other programs, and what there is instead."""

_ARGUMENTS: Final = {
    "model": WANTED,
    "artifact": "a model of which there is a build, a tag, or the folder of a build or an artifact",
}
"""What an argument is, for one that is missing."""

_TYPED: Final = "nf4_pipeline.typed"
"""Under which a context keeps what was typed behind its command."""

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
        ctx.meta[_TYPED] = tuple(args)
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
        return f"{said.rstrip('.')}{_missing(error.param, context)}"
    if context is not None and said.startswith("Got unexpected extra argument"):
        return _too_many(context) or said
    return said


def _missing(param: click.Parameter | None, context: click.Context | None) -> str:
    """What to say of something that is missing: what it is, and a line that has it."""
    command = context.command if context is not None else None
    if not isinstance(command, CommandWithExamples) or context is None or param is None:
        return ""
    if isinstance(param, click.Option):
        is_what = f": {param.help.rstrip('.')}." if param.help else "."
        option = param.opts[0]
        line = next((line for line, _ in command.examples if f"{option} " in line), "")
        value = line.partition(f"{option} ")[2].partition(" ")[0]
        if value and (typed := context.meta.get(_TYPED)):
            line = f"{context.command_path} {shlex.join(typed)} {option} {value}"
        return f"{is_what} For example: {line or command.examples[0][0]}"
    what = _ARGUMENTS.get(param.name or "", "")
    said = f": {what}." if what else "."
    return f"{said} For example: {command.examples[0][0]}"


def _too_many(context: click.Context) -> str | None:
    """What to say of words for which a command has no place; None if that is not known."""
    words = [word for word in context.meta.get(_TYPED, ()) if not word.startswith("-")]
    if context.info_name == "prompt" and len(words) == len(context.meta[_TYPED]):
        text = " ".join(words[1:])
        line = f"{context.command_path} {shlex.quote(words[0])} {quoted_text(text)}"
        return f"A text of several words stands in quotes: {line}"
    if words == list(context.meta.get(_TYPED, ())) and len(words) > 1:
        lines = " && ".join(f"{context.command_path} {shlex.quote(word)}" for word in words)
        return f"{context.command_path} takes one model at a time. One after the other: {lines}"
    return None


def quoted_text(text: str) -> str:
    """A text as a word of a shell, in double quotes if it can stand in them."""
    return f'"{text}"' if not {*text} & {*'"$`\\!'} else shlex.quote(text)


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
    word = option.lstrip("-").replace("_", "-").casefold()
    if (argument := _as_argument(option, context)) is not None:
        return argument
    longer = [known[name] for name in known if word and name.startswith(word)]
    if longer:
        return f" Did you mean {' or '.join(map(repr, longer[:3]))}?"
    if (other := _OTHER_OPTIONS.get(word)) in known.values():
        such = " cuda" if word in ("gpu", "cuda") else ""
        return f" Did you mean '{other}{such}'?"
    if others := _commands_with(f"--{word}", context):
        which = ", ".join(f"`nf4 {name}`" for name in others[:4])
        return f" It is one of {which}. Leave it out here."
    if word in _ALWAYS:
        return (
            " nf4 always makes the 4-bit weights of bitsandbytes (NF4, blocks of 64, double "
            "quantization). Leave it out."
        )
    if word in _ELSEWHERE:
        return f" {_ELSEWHERE[word]}"
    if near := [known[name] for name in near_names(word, known)]:
        return f" Did you mean {' or '.join(map(repr, near))}?"
    if "recipe" in known:
        key = _in_recipe(word.replace("-", "_"), option, context)
        if key is not None:
            return key
    return f" `{context.command_path} --help` lists its options."


def _as_argument(option: str, context: click.Context) -> str | None:
    """For an option that is called as an argument is; None for any other."""
    arguments = [
        param.name
        for param in context.command.get_params(context)
        if isinstance(param, click.Argument)
    ]
    name = option.lstrip("-")
    if name not in arguments:
        name = {"prompt": "text", "m": "model", "model": "artifact"}.get(name, "")
    words, value = _without(option, context)
    if name not in arguments or not value:
        return None
    at = arguments.index(name)
    words = [*words[:at], value, *words[at:]]
    line = " ".join(quoted_text(word) if " " in word else shlex.quote(word) for word in words)
    return f" {name.upper()} is no option. Write it without: {context.command_path} {line}"


def _commands_with(option: str, context: click.Context) -> list[str]:
    """The other commands that have an option."""
    group = context.find_root().command
    if not isinstance(group, click.Group):
        return []
    return [
        name
        for name in group.list_commands(context)
        if (command := group.get_command(context, name)) is not None
        and any(option in param.opts for param in command.params)
        and command is not context.command
    ]


def _in_recipe(key: str, option: str, context: click.Context) -> str | None:
    """How to say what stands in a recipe, for an option that is called as a key of one; else None.

    Args:
        key: a name.
        option: as it was typed.
        context: of the command.
    """
    from nf4_pipeline.recipe import TABLES, Recipe

    table = next((name for name in TABLES if key in Recipe().table(name)), None)
    if table is None:
        return None
    said = f" It is a key of a recipe, under [{table}]."
    words, value = _without(option, context)
    if not value or any(word.partition("=")[0] == "--recipe" for word in words):
        return f"{said} Write it there, and name that file with --recipe."
    usual = Recipe().table(table)[key]
    right = f'["{value}"]' if isinstance(usual, list) else value
    if isinstance(usual, str):
        right = f'"{value}"'
    names = (f"my{number}.toml" for number in ("", *range(2, 1000)))
    file = next(name for name in names if not Path(name).exists())
    line = f"[{table}]\\n{key} = {right}\\n"
    return (
        f"{said} Write it there, and name that file: printf {shlex.quote(line)} > {file} && "
        f"{context.command_path} {shlex.join(words)} --recipe {file}"
    )


def _without(option: str, context: click.Context) -> tuple[list[str], str]:
    """What was typed without an option and its value, and that value; "" if it has none."""
    typed = list(context.meta.get(_TYPED, ()))
    at = next((n for n, word in enumerate(typed) if word.partition("=")[0] == option), len(typed))
    name, is_joined, value = (typed[at] if at < len(typed) else "").partition("=")
    rest = typed[at + 1 :]
    if name and not is_joined and rest and not rest[0].startswith("-"):
        value, *rest = rest
    return [*typed[:at], *rest], value


def _value_of(option: str, context: click.Context) -> str:
    """What an option takes as its value, for one that was given none."""
    param = _options(context).get(option)
    if not isinstance(param, click.Option) or param.is_flag:
        return ""
    if (expected := getattr(param.type, "expected", "")) != "":
        return f" It takes {expected}. For example: {option} {getattr(param.type, 'example', '')}"
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
