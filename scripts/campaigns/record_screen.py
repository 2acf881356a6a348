"""Records what a command shows, with the time of each piece, and says the longest silence.

    python scripts/campaigns/record_screen.py --columns 60 build.cast nf4 build sample

The recording is an asciinema file, version 2: a header, then one JSON array a line. `--plain` runs
the command without a terminal. Silence counts from the start of the command to its end.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import click

_ROWS: Final = 24
_LARGEST_PIECE: Final = 65536
_SHOWN: Final = 5  # of the silences


@dataclass(frozen=True)
class Piece:
    """What came in one go, so many seconds after the start."""

    seconds: float
    text: str


@dataclass(frozen=True)
class Recording:
    """What a command showed.

    Attributes:
        columns: of the terminal.
        pieces: in their order.
        seconds: from its start to its end.
        status: its exit status.
    """

    columns: int
    pieces: tuple[Piece, ...]
    seconds: float
    status: int

    def gaps(self) -> list[tuple[float, float]]:
        """The silences, the longest first: seconds, and when each began."""
        times = [0.0, *(piece.seconds for piece in self.pieces), self.seconds]
        gaps = ((after - before, before) for before, after in pairwise(times))
        return sorted(gaps, reverse=True)

    def cast(self) -> str:
        """The recording as asciinema 2 has it."""
        header = {"version": 2, "width": self.columns, "height": _ROWS}
        events = [[round(piece.seconds, 3), "o", piece.text] for piece in self.pieces]
        return "".join(json.dumps(line) + "\n" for line in [header, *events])


def record(command: list[str], columns: int, *, plain: bool = False) -> Recording:
    """Runs a command and keeps what it shows, stdout and stderr as they come.

    Args:
        command: the program and its arguments.
        columns: of the terminal.
        plain: give it a pipe instead of a terminal.
    """
    shown, slave = os.pipe() if plain else pty.openpty()
    if not plain:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
    variables = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        env={**variables, "TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(slave)
    pieces = []
    rest = b""
    while True:
        select.select([shown], [], [])
        try:
            data = os.read(shown, _LARGEST_PIECE)
        except OSError:  # the other end of a terminal is closed
            break
        if not data:
            break
        data, rest = _whole(rest + data)
        pieces.append(Piece(time.monotonic() - start, data.decode("utf-8", "replace")))
    os.close(shown)
    status = process.wait()
    return Recording(columns, tuple(pieces), time.monotonic() - start, status)


def _whole(data: bytes) -> tuple[bytes, bytes]:
    """Whole characters, and the beginning of one whose end is still to come."""
    for kept in range(1, min(4, len(data)) + 1):
        first = data[-kept]
        if first >= 0xC0:  # begins a character of two to four bytes
            needed = 2 + (first >= 0xE0) + (first >= 0xF0)
            return (data[:-kept], data[-kept:]) if kept < needed else (data, b"")
        if first < 0x80:
            break
    return data, b""


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--columns", default=80, show_default=True, help="Of the terminal.")
@click.option("--plain", is_flag=True, help="No terminal: a pipe.")
@click.argument("cast", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def main(columns: int, plain: bool, cast: Path, command: tuple[str, ...]) -> None:
    """Record COMMAND into the file CAST."""
    recording = record(list(command), columns, plain=plain)
    cast.write_text(recording.cast(), "utf-8")
    where = "without a terminal" if plain else f"at {columns} columns"
    click.echo(f"{where}: {recording.seconds:.1f} s, status {recording.status}, {cast}")
    for gap, begin in recording.gaps()[:_SHOWN]:
        click.echo(f"  silent for {gap:5.2f} s from {begin:6.2f} s on")
    sys.exit(recording.status)


if __name__ == "__main__":
    main()
