"""How far work is, without printing: stages report, the command line decides what shows.

A stage asks a `Reporter` for a `Task` and advances it. Tasks may overlap, nest, and come from
several threads. `SILENT` ignores all of it, so library code never needs to know whether anybody
watches.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Final, Protocol

LOADING: Final = "load libraries"
"""The title of a task in which nothing but imports happens."""


class Task(Protocol):
    """One running piece of work."""

    def advance(self, amount: int) -> None:
        """Adds `amount` (bytes, or items) to what is done. May be called from any thread."""


class Stage(Protocol):
    """A stage of a job, while it runs."""

    def finish(
        self, *, ran: bool, nbytes: int = 0, has_rate: bool = False, verdict: str = ""
    ) -> None:
        """Says what came of it, before it ends. A stage that fails says nothing.

        Args:
            ran: False if an earlier result was still valid.
            nbytes: what it worked on, or what it left.
            has_rate: all of these bytes passed through it between its start and now.
            verdict: "pass" or "fail", if it gives one.
        """


class Reporter(Protocol):
    """Where long work is announced."""

    def stage(self, name: str, number: int = 1, of: int = 1) -> AbstractContextManager[Stage]:
        """Begins a stage of a job; one at a time.

        Args:
            name: of the stage.
            number: its place in the job, from 1 on.
            of: how many stages the job has.
        """

    def task(
        self, title: str, total: int | None, *, unit: str = "bytes"
    ) -> AbstractContextManager[Task]:
        """Opens a task.

        Args:
            title: what is done.
            total: bytes of it (or items, if `unit` names them); None if nobody can say.
            unit: of the total.
        """

    def note(self, text: str) -> None:
        """Says one thing that the user should know while the work goes on.

        A text that begins with "Warning:" is said to those, too, who want to hear of nothing else.
        """


class _SilentTask:
    def advance(self, amount: int) -> None:
        pass


class _SilentStage:
    def finish(
        self, *, ran: bool, nbytes: int = 0, has_rate: bool = False, verdict: str = ""
    ) -> None:
        pass


class SilentReporter:
    """Ignores what it is told; a base for reporters that care for a part of it."""

    def stage(self, name: str, number: int = 1, of: int = 1) -> AbstractContextManager[Stage]:
        return nullcontext(_SilentStage())

    def task(
        self, title: str, total: int | None, *, unit: str = "bytes"
    ) -> AbstractContextManager[Task]:
        return nullcontext(_SilentTask())

    def note(self, text: str) -> None:
        pass


SILENT: Reporter = SilentReporter()
