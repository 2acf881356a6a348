"""The command line: one file per command; parse, call, print. Nothing else in the project prints.

A command's file is imported only when the command is named, and what is heavy only inside its call,
so `nf4 --help` answers at once.

    options.py    options that commands share, and what they become
    help.py       examples on help pages, and what is said of a line that cannot be read
    named_builds.py  the build or the artifact that a command is about
    terminal.py   the one place that prints; what controls a terminal is shown instead
    reporting.py  progress on stderr
    pace.py       what is left of a job, by how long it took last time
    module_tree.py  the modules of an artifact as a tree, with bits and error
    forecast.py   what a person sees of `nf4 build --dry-run`
    summary.py    what a person sees at the end of `nf4 build`

and the commands, as `COMMANDS` tells them: build.py, batch.py, download.py, quantize.py,
serialize.py, verify.py, attest.py, push.py, prompt.py, inspect.py, report.py, reproduce.py,
rebuild.py, sign.py, check.py, status.py, doctor.py.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, Final

import click

from nf4_pipeline import __version__
from nf4_pipeline.cli.help import no_such_command, usage_message, write_examples
from nf4_pipeline.cli.terminal import guarded, say, show_cursor
from nf4_pipeline.errors import (
    PipelineError,
    StoppedError,
    is_of_machine,
    of_installation,
    of_system,
)
from nf4_pipeline.printable import printable

COMMANDS: Final = {
    "build": "download, quantize, serialize, verify and attest; skips what is done and still valid",
    "batch": "build many models and recipes, and say what came of each",
    "download": "pin, fetch and hash a checkpoint",
    "quantize": "turn linear layers into NF4 codes",
    "serialize": "write the publishable folder and its manifest",
    "verify": "reload the artifact and hold it against the 16-bit model",
    "attest": "write provenance and a bill of materials into a verified artifact",
    "push": "publish a verified export to the Hub, and prove what the Hub holds",
    "prompt": "generate text with an artifact",
    "inspect": "what is inside an artifact",
    "report": "what came of a build, for CI: a summary, outputs, annotations",
    "reproduce": "derive an artifact again from its source and compare every byte",
    "rebuild": "fetch published artifacts, derive each again, and give each a verdict",
    "sign": "sign every file of an artifact with a key of yours",
    "check": "check that an artifact holds exactly what was signed",
    "status": "the stages of a build: done, stale, missing, and why",
    "doctor": "what this machine has, and known traps on it",
}


class _LazyGroup(click.Group):
    """Knows its commands by name, and imports one when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"nf4_pipeline.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name in COMMANDS or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        raise click.UsageError(no_such_command(name, list(COMMANDS), args[1:]), ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(_EXAMPLES, formatter)
        with formatter.section("Completion of what you type"):
            formatter.write_dl(list(_COMPLETION.items()))


_EXAMPLES: Final = (
    (
        "nf4 build sample",
        "A small model that comes along: no GPU, no network, 15 seconds.",
    ),
    ("nf4 build tiiuae/falcon-7b-instruct --calibrate self", "A model of the Hub, the better way."),
)
_COMPLETE: Final = "_NF4_COMPLETE"
_COMPLETION: Final = {
    "~/.bashrc": 'eval "$(_NF4_COMPLETE=bash_source nf4)"',
    "~/.zshrc": 'eval "$(_NF4_COMPLETE=zsh_source nf4)"',
    "~/.config/fish/config.fish": "_NF4_COMPLETE=fish_source nf4 | source",
}
"""The line that makes a shell complete commands, options and models, and the file that it goes
into."""


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="nf4")
def cli() -> None:
    """Quantize a Hugging Face causal LM to bitsandbytes NF4, prove what it is worth, publish it."""


def main(args: list[str] | None = None) -> None:
    """Runs the command line and exits: 0 good, 1 the job failed, 2 wrong usage, 128 + a signal."""
    if _COMPLETE in os.environ:  # a shell asks what may follow; it gets bytes, and no messages
        cli.main(args=args, prog_name="nf4")
    with guarded(), _interruptible():
        status = _run(args)
    if _stopped_by:
        with suppress(OSError):
            show_cursor()  # wherever the display was interrupted
        # Python ends by the signal again, if it came while a library was imported
        os._exit(status)
    sys.exit(status)


def _run(args: list[str] | None) -> int:
    """Runs the command line; every error becomes a message and an exit code here."""
    try:
        try:
            status: Any = cli.main(args=args, prog_name="nf4", standalone_mode=False)
        except SystemExit as ended:
            status = ended.code
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        with suppress(OSError):
            say(error.ctx.get_help() if error.ctx else "", err=True, lines=True, limit=sys.maxsize)
        return error.exit_code
    except click.ClickException as error:
        _say_usage(error)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say_stopped(_STOPPED)
        return _stopped_status()
    except StoppedError as error:
        _say_stopped(str(error))
        return _stopped_status()
    except PipelineError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        return 1
    except (OSError, MemoryError) as error:
        return _fail(str(of_system(error, "nf4")))
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if _stopped_by:  # a library made something else of the interrupt
            _say_stopped(_STOPPED)
            return _stopped_status()
        if isinstance(error, RuntimeError) and is_of_machine(error):
            return _fail(str(of_system(error, "nf4")))
        if (broken := of_installation(error, "nf4")) is not None:
            return _fail(str(broken))
        return _fail(_say_failed_import(error) or _say_bug(error))


def _fail(text: str, exit_code: int = 1) -> int:
    if _stopped_by:  # what failed was on its way to an end
        _say_stopped(_STOPPED)
        return _stopped_status()
    with suppress(OSError):  # the disk or the pipe behind stderr
        say(f"Error: {text}", err=True)
    return exit_code


def _say_usage(error: click.ClickException) -> None:
    """What click says of a command that cannot be read: the usage, and what is wrong."""
    context = getattr(error, "ctx", None)
    if context is not None:
        usage = f"{context.get_usage()}\nTry '{context.command_path} --help' for help.\n"
        with suppress(OSError):
            say(usage, err=True, lines=True)
    _fail(usage_message(error))


def _say_failed_import(error: BaseException) -> str | None:
    """The message for a library that cannot be imported; None for any other error."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.partition(".")[0]
        if missing != _PACKAGE:
            return f"{missing} is not installed, and is needed here: install nf4-pipeline again."
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__", ""))
        library = name.partition(".")[0]
        if frame.f_code.co_name == "<module>" and library not in (_PACKAGE, "__main__"):
            text = " ".join(str(error).split())[:300].rstrip(".")
            if named := _variables_in(text):
                if (number := _no_number(named, text)) is not None:
                    return number
                return (
                    f"{library} cannot be imported with {' and '.join(named)} "
                    f"({type(error).__name__}: {text}). Correct it, or unset it."
                )
            return (
                f"{library} cannot be imported: {type(error).__name__}: {text}. Libraries read the "
                "environment as they are imported: correct or unset the variable that holds this; "
                f"if none does, install {library} again."
            )
    return None


def _variables_in(text: str) -> list[str]:
    """The variables of the environment whose value a message quotes, with their values."""
    return [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(_READ_BY_LIBRARIES)
        and "TOKEN" not in name.partition("_")[2]  # a secret, and never a number
        and value.strip()
        and repr(value.strip()) in text
    ]


def _no_number(named: list[str], text: str) -> str | None:
    """What to say of variables that should hold a number; None if a library says something else.

    Args:
        named: the variables, with their values.
        text: what the library said.
    """
    whole = "invalid literal for int" in text
    if not whole and "convert string to float" not in text:
        return None
    said = " and ".join(
        f"{name} is {value!r}" for name, _, value in (n.partition("=") for n in named)
    )
    seconds = " of seconds" if all("TIMEOUT" in name.partition("=")[0] for name in named) else ""
    expected = f"a {'whole ' if whole else ''}number{seconds}, such as 10"
    return (
        f"{said}; expected {expected}. Set it so, or unset it: unset {named[0].partition('=')[0]}"
    )


def _say_bug(error: BaseException) -> str:
    """The message for an error that nobody expected; its traceback goes into a file."""
    trace = "".join(traceback.format_exception(error))
    text = " ".join(str(error).split())[:500].rstrip(".")
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if os.environ.get("NF4_DEBUG"):
        say(trace, err=True, lines=True, limit=len(trace))
        return f"{what}. This is a bug in nf4-pipeline; please report it."
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="nf4_bug_", suffix=".txt", delete=False
        ) as file:
            file.write(printable(trace, len(trace), lines=True))
        where = f"with the traceback in {file.name}"
    except OSError:
        where = "with the traceback that NF4_DEBUG=1 shows"
    return f"{what}. This is a bug in nf4-pipeline; please report it, {where}."


_STOPPED: Final = "Stopped. What is finished is kept; run the same command again to continue there."
_PATIENCE: Final = 1.5
"""Seconds in which an interrupted command may end by itself. Ending it then harms nothing: every
file that counts is complete or absent at any moment."""


_PACKAGE: Final = __name__.partition(".")[0]
_READ_BY_LIBRARIES: Final = (
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TORCH", "PYTORCH_", "NUMBA_", "BNB_", "CUDA_"),
    *("OMP_", "MKL_", "TOKENIZERS_", "ACCELERATE_", "MPL"),
)
"""How variables begin that libraries read as they are imported."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_stopped_by: list[int] = []


def _stopped_status() -> int:
    """130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP: as a shell says of the signal."""
    return 128 + (_stopped_by[0] if _stopped_by else signal.SIGINT)


@contextmanager
def _interruptible() -> Iterator[None]:
    """A signal that asks for the end gets one soon, whatever a command waits for; a second at once.

    The end is an orderly one: child processes and their temporary folders go, too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Ignored are they in a job in the background, or behind `nohup`.
    heard = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]

    def interrupt(number: int, _: object) -> None:
        if _stopped_by:
            _end_now()
        _stopped_by.append(number)
        sys.unraisablehook = lambda _: None  # it may come where Python can only complain
        timer = threading.Timer(_PATIENCE, _end_now)
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    for number in heard:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        if not _stopped_by:  # the work is over; what is left are milliseconds of the end
            for number in heard:
                signal.signal(number, signal.SIG_IGN)


def _end_now() -> None:
    with suppress(OSError):
        show_cursor()
    _say_stopped(_STOPPED)
    os._exit(_stopped_status())


_said: list[str] = []


def _say_stopped(text: str) -> None:
    """Says once that, and with what left, the command was stopped."""
    if not _said:
        _said.append(text)
        with suppress(OSError):
            say(f"\n{text}", err=True, lines=True)
