"""The one place that writes to the terminal: what controls it is shown, not sent.

Commands say what they have to say through `say` and `say_json`. What libraries print, log or warn
of passes through the same filter, since `guarded` puts it before stdout and stderr; so nothing that
a stranger wrote reaches the terminal as it is, whoever prints it.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TextIO

import click

from nf4_pipeline.printable import LONGEST, printable

_STANDARD: Final = (0, 1, 2)
_OF_A_BAR: Final = re.compile(r"\r(?P<text>[^\r]*)|(?:\n|\x1b\[A)+")
"""What tqdm writes in one go: a line over the last one, or the way to another bar."""


def program() -> str:
    """How this program was called, so that a line that begins with it can be pasted."""
    called = sys.argv[0] if sys.argv else ""
    if Path(called).name != "nf4":
        return "nf4" if shutil.which("nf4") else "python -m nf4_pipeline"
    found = shutil.which("nf4")
    if found is not None and Path(found).resolve() == Path(called).resolve():
        return "nf4"
    here = os.path.relpath(called)
    return shlex.quote(here if len(here) < len(called) else called)


def say(
    text: str = "",
    *,
    err: bool = False,
    lines: bool = False,
    limit: int = LONGEST,
    highlight: tuple[str, str] | None = None,
) -> None:
    """Prints a text and ends the line.

    Args:
        text: what control characters it holds is shown as `\\x1b`.
        err: to stderr.
        lines: line breaks and tabs stay, as in an answer; else they are shown, too, so that no
            text can pass for two lines.
        limit: characters of it, at most.
        highlight: a word of the text, and the colour that it has on a terminal.
    """
    stream = sys.stderr if err else sys.stdout
    shown = printable(text, limit, lines=lines)
    if highlight is not None and has_colours(stream):
        word, colour = highlight
        shown = shown.replace(word, click.style(word, fg=colour, bold=True), 1)
    _unguarded(stream).write(shown + "\n")
    stream.flush()


def say_brief(text: str, *, highlight: tuple[str, str] | None = None) -> None:
    """Prints one line on stdout that is cut where a terminal would break it.

    Args:
        text: as in `say`, like `highlight`; anywhere but on a terminal it is not cut.
        highlight: stands near its beginning.
    """
    shown = printable(text)
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        shown = shown if len(shown) <= width else shown[: width - 1] + "…"
    say(shown, highlight=highlight)


def has_colours(stream: TextIO) -> bool:
    """Whether colours may be sent there: a terminal, and nobody who asks for none."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def show_cursor() -> None:
    """Shows the cursor again, which a display that could not end may have hidden."""
    stream: TextIO | None = sys.stderr
    if stream is not None and stream.isatty():  # None: it was closed when Python began
        _unguarded(stream).write("\x1b[?25h")


def say_piece(text: str) -> None:
    """Prints a piece of a text on stdout that comes bit by bit; the line goes on.

    Args:
        text: line breaks and tabs stay; other control characters are shown.
    """
    _unguarded(sys.stdout).write(printable(text, len(text), lines=True))
    sys.stdout.flush()


def say_json(value: Any) -> None:
    """Prints a JSON value on stdout, in ASCII."""
    text = json.dumps(value, indent=2).replace("\x7f", "\\u007f")
    _unguarded(sys.stdout).write(text + "\n")
    sys.stdout.flush()


def terminal_of(stream: TextIO) -> TextIO:
    """What is behind the filter of a stream, for a library that draws on a terminal itself.

    Whoever hands it a text makes it `printable` first.
    """
    return _unguarded(stream)


@contextmanager
def guarded() -> Iterator[None]:
    """Has everything that is printed pass the filter, whoever prints it.

    A stream that was closed when the program began (`2>&-`) leads nowhere: else the next file that
    is opened would have its number, and what is printed would go into it.
    """
    _open_closed()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
        sys.stdout, sys.stderr = (_Guarded(stream or nowhere) for stream in before)
        try:
            yield
        finally:
            _flush(sys.stdout)
            _flush(sys.stderr)
            sys.stdout, sys.stderr = before


def let_bars_through() -> None:
    """Lets the progress bars of a library be drawn on stderr; what they say is filtered still."""
    if isinstance(sys.stderr, _Guarded):
        sys.stderr.draws_bars = True


class _Guarded(io.TextIOBase):
    """A text stream that shows what controls a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.draws_bars = False
        if isinstance(stream, io.TextIOWrapper):  # a locale without the letter is no failure
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self.stream.write(self._shown(text))
        return len(text)

    def _shown(self, text: str) -> str:
        if self.draws_bars and (bar := _OF_A_BAR.fullmatch(text)):
            line = bar["text"]
            return text if line is None else "\r" + printable(line)
        return printable(text, len(text), lines=True)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self.stream.errors


def _unguarded(stream: TextIO) -> TextIO:
    return stream.stream if isinstance(stream, _Guarded) else stream


def _open_closed() -> None:
    for number in _STANDARD:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one


def _flush(stream: TextIO | _Guarded) -> None:
    """Writes what is left; nothing more is tried where nobody takes it."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
