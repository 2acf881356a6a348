"""How far work is, without printing: stages report, the command line decides what shows.

A stage asks a `Reporter` for a `Task` and advances it. Tasks may overlap, nest, and come from
several threads. `SILENT` ignores all of it, so library code never needs to know whether anybody
watches. Users of the Python API give a callback instead, which hears of each step as a
`ProgressEvent` (`reporting_to`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol

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

    def detail(self, text: str) -> None:
        """Says one thing that only those want to know who asked for more: what was decided, why."""


class _SilentTask:
    def advance(self, amount: int) -> None:
        pass


SILENT_TASK: Final = _SilentTask()
"""Tells nobody."""


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
        return nullcontext(SILENT_TASK)

    def note(self, text: str) -> None:
        pass

    def detail(self, text: str) -> None:
        pass


SILENT: Reporter = SilentReporter()


class HighWaterTask:
    """A part of a task that may be tried again: what a new try repeats does not count twice.

    Args:
        task: the one to advance.
        size: of the part; no try counts beyond it. None for no limit.
    """

    def __init__(self, task: Task, size: int | None = None) -> None:
        self._task, self._size = task, size
        self._now = self._furthest = 0
        self._lock = threading.Lock()

    def restart(self, at: int = 0) -> None:
        """Begins a try, the first or another one, where `at` of it is done."""
        with self._lock:
            self._now = at

    def advance(self, amount: int) -> None:
        """Adds to what this try has done. May be called from any thread."""
        with self._lock:
            self._now += amount
            furthest = self._now if self._size is None else min(self._now, self._size)
            more = max(0, furthest - self._furthest)
            self._furthest += more
        if more:
            self._task.advance(more)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressEvent:
    """One step of a long job, as a callback hears of it.

    Attributes:
        kind: what happened. Tasks are pieces of work; they may overlap, in a stage or outside of
            any.
        stage: the name of the stage that runs, such as "quantize"; empty outside of a job.
        stage_number: its place in the job, from 1 on; 0 outside of a job.
        stages: how many stages the job has.
        ran: of "stage_end": True if it ran, False if an earlier result was still valid, None if
            it failed. None of any other event.
        task: what is done in the task; empty unless the event is of one.
        task_id: tells apart tasks that overlap; 0 unless the event is of one.
        done: of the task's total, by now.
        total: bytes or items of the task; None if nobody can say.
        unit: of `done` and `total`: "bytes", or what the items are.
        text: of "note": what the user should know while the work goes on. Warnings begin with
            "Warning:".
    """

    kind: Literal["stage_begin", "stage_end", "task_begin", "task_advance", "task_end", "note"]
    stage: str = ""
    stage_number: int = 0
    stages: int = 0
    ran: bool | None = None
    task: str = ""
    task_id: int = 0
    done: int = 0
    total: int | None = None
    unit: str = ""
    text: str = ""


ProgressCallback = Callable[[ProgressEvent], object]
"""Called with each event, from any thread, but never by two at once. What it raises ends the job;
it is not called again then."""


@contextmanager
def reporting_to(callback: ProgressCallback | None) -> Iterator[Reporter]:
    """A reporter that tells a callback while the body runs; for None, the silent one.

    What the callback raises leaves the body as it was raised, though a stage or the Hub's client
    may take it for an error of its own. An interrupt that comes while it runs is like any other.
    """
    if callback is None:
        yield SILENT
        return
    reporter = _CallbackReporter(callback)
    try:
        yield reporter
    except BaseException:
        if reporter.raised is None or isinstance(reporter.raised, KeyboardInterrupt):
            raise
        raise reporter.raised from None
    if reporter.raised is not None:
        raise reporter.raised


class _CallbackReporter:
    def __init__(self, callback: ProgressCallback) -> None:
        self._callback = callback
        self._lock = threading.RLock()  # a callback may call what reports to it
        self.raised: BaseException | None = None
        self._tasks = 0
        self._stage = ProgressEvent(kind="stage_begin")

    @contextmanager
    def stage(self, name: str, number: int = 1, of: int = 1) -> Iterator[Stage]:
        before, shown = self._stage, _ToldStage()
        begun = ProgressEvent(kind="stage_begin", stage=name, stage_number=number, stages=of)
        self._stage = begun
        self._tell(begun)
        try:
            yield shown
        finally:
            self._stage = before
            self._tell(replace(begun, kind="stage_end", ran=shown.ran))

    @contextmanager
    def task(self, title: str, total: int | None, *, unit: str = "bytes") -> Iterator[Task]:
        with self._lock:
            self._tasks += 1
            begun = replace(
                self._stage,
                kind="task_begin",
                task=title,
                task_id=self._tasks,
                total=total,
                unit=unit,
            )
        task = _ToldTask(begun, self._tell)
        self._tell(begun)
        try:
            yield task
        finally:
            task.end()

    def note(self, text: str) -> None:
        self._tell(replace(self._stage, kind="note", text=text))

    def detail(self, text: str) -> None:
        """A callback hears of steps and of notes."""

    def _tell(self, event: ProgressEvent) -> None:
        with self._lock:
            if self.raised is not None:  # whoever tries again is told so again
                raise self.raised
            try:
                self._callback(event)
            except BaseException as error:
                self.raised = error
                raise


class _ToldStage:
    def __init__(self) -> None:
        self.ran: bool | None = None

    def finish(
        self, *, ran: bool, nbytes: int = 0, has_rate: bool = False, verdict: str = ""
    ) -> None:
        self.ran = ran


class _ToldTask:
    def __init__(self, begun: ProgressEvent, tell: Callable[[ProgressEvent], None]) -> None:
        self._now = begun
        self._tell = tell
        self._lock = threading.RLock()

    def advance(self, amount: int) -> None:
        self._move("task_advance", amount)

    def end(self) -> None:
        self._move("task_end", 0)

    def _move(self, kind: Literal["task_advance", "task_end"], amount: int) -> None:
        with self._lock:  # so that `done` never falls
            self._now = replace(self._now, kind=kind, done=self._now.done + amount)
            self._tell(self._now)
