"""Progress on stderr: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from nf4_pipeline.cli.terminal import say, terminal_of
from nf4_pipeline.printable import printable
from nf4_pipeline.progress import Reporter, Task

_PLAIN_EVERY: Final = 5.0
"""Seconds between two plain lines of one task: enough for a log, not too much."""

_SHOW_AFTER: Final = 1.0
"""Seconds after which a task is worth showing."""


def make_reporter() -> Reporter:
    """Bars if stderr is a terminal, plain lines if it is not."""
    return _Bars() if sys.stderr.isatty() else _Lines()


class _Bars:
    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(file=terminal_of(sys.stderr))

    def note(self, text: str) -> None:
        self._console.print(
            printable(text), markup=False, emoji=False, highlight=False, soft_wrap=True
        )

    @contextmanager
    def task(self, title: str, total: int, *, unit: str = "bytes") -> Iterator[Task]:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns: list[ProgressColumn] = [
            TextColumn("{task.description:<14}", markup=False),
            BarColumn(32),
        ]
        if unit == "bytes":
            columns += [DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
        else:
            columns += [
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}", markup=False),
                TimeElapsedColumn(),
            ]
        # What others print meanwhile passes the filter of `terminal.guarded`, not rich.
        with Progress(
            *columns,
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as progress:
            identity = progress.add_task(printable(title), total=total, unit=printable(unit))

            class Bar:
                def advance(self, amount: int) -> None:
                    progress.advance(identity, amount)

            yield Bar()


class _Lines:
    def note(self, text: str) -> None:
        say(text, err=True)

    @contextmanager
    def task(self, title: str, total: int, *, unit: str = "bytes") -> Iterator[Task]:
        line = _Line(title, total, unit)
        yield line
        line.end()


class _Line:
    """One task as plain lines, none at all if it is over in a second."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done = 0
        self._start = time.monotonic()
        self._next = self._start + _SHOW_AFTER
        self._lock = threading.Lock()

    def advance(self, amount: int) -> None:
        with self._lock:
            self._done += amount
            now = time.monotonic()
            if now >= self._next and self._done < self._total:
                self._next = now + _PLAIN_EVERY
                self._say(now)

    def end(self) -> None:
        now = time.monotonic()
        if now - self._start >= _SHOW_AFTER:
            self._say(now)

    def _say(self, now: float) -> None:
        seconds = now - self._start
        share = self._done / self._total if self._total else 1.0
        if self._unit != "bytes":
            text = f"{self._done} of {self._total} {self._unit}, {seconds:.0f} s"
        else:
            rate = self._done / seconds if seconds else 0.0
            left = (self._total - self._done) / rate if rate else 0.0
            unit, scale = ("GB", 1e9) if self._total >= 1e8 else ("MB", 1e6)
            text = (
                f"{self._done / scale:.2f} of {self._total / scale:.2f} {unit} ({share:.0%}), "
                f"{rate / 1e6:.0f} MB/s, {left:.0f} s left"
            )
        say(f"{self._title}: {text}", err=True)
