"""How long work is reported, without printing: stages report, the command line decides what shows.

A stage asks a `Reporter` for a `Task` of known size and advances it. `SILENT` ignores all of it, so
library code never needs to know whether anybody watches.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Task(Protocol):
    """One running piece of work."""

    def advance(self, amount: int) -> None:
        """Adds `amount` (bytes, or items) to what is done. May be called from any thread."""


class Reporter(Protocol):
    """Where long work is announced."""

    def task(self, title: str, total: int, *, unit: str = "bytes") -> AbstractContextManager[Task]:
        """Opens a task of `total` bytes (or items, if `unit` names them)."""

    def note(self, text: str) -> None:
        """Says one thing that the user should know while the work goes on."""


class _SilentTask:
    def advance(self, amount: int) -> None:
        pass


class _SilentReporter:
    def task(self, title: str, total: int, *, unit: str = "bytes") -> AbstractContextManager[Task]:
        return nullcontext(_SilentTask())

    def note(self, text: str) -> None:
        pass


SILENT: Reporter = _SilentReporter()
