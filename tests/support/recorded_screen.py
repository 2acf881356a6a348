"""What a command shows on a terminal, or without one, with the time of each piece."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from tests.support.tiny import listen_to_interrupts

_ROWS: Final = 24
_LARGEST_PIECE: Final = 65536
_CONTROL: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


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

    @property
    def text(self) -> str:
        """All of it, controls included."""
        return "".join(piece.text for piece in self.pieces)

    def lines(self) -> list[str]:
        """Every line that was written, those that were drawn over included; no controls."""
        return re.split(r"[\r\n]+", _CONTROL.sub("", self.text))

    def cast(self) -> str:
        """The recording as asciinema 2 has it."""
        header = {"version": 2, "width": self.columns, "height": _ROWS}
        events = [[round(piece.seconds, 3), "o", piece.text] for piece in self.pieces]
        return "".join(json.dumps(line) + "\n" for line in [header, *events])


def record(
    command: Sequence[str],
    columns: int = 80,
    *,
    plain: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Recording:
    """Runs a command and keeps what it shows, stdout and stderr as they come.

    Args:
        command: the program and its arguments.
        columns: of the terminal.
        plain: give it a pipe instead of a terminal.
        environment: of the command; None for that of this process, colours allowed.
    """
    shown, slave = os.pipe() if plain else pty.openpty()
    if not plain:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
    variables = dict(environment or os.environ | {"TERM": "xterm-256color", "NO_COLOR": ""})
    for name in ("COLUMNS", "LINES"):
        variables.pop(name, None)
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        env=variables,
        start_new_session=True,
        preexec_fn=listen_to_interrupts,
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
