"""A progress callback: what it hears of, in which order, and what becomes of what it raises."""

from __future__ import annotations

import contextlib
import threading

import pytest
from nf4_pipeline.errors import ResourceError, StoppedError
from nf4_pipeline.progress import SILENT, HighWaterTask, ProgressEvent, reporting_to

from tests.support.told import ToldTask


def test_stages_tasks_and_notes_are_told_in_order() -> None:
    events: list[ProgressEvent] = []
    with reporting_to(events.append) as reporter:
        with reporter.stage("quantize", 2, 5) as stage, reporter.task("read", 10) as outer:
            outer.advance(4)
            with reporter.task("write", None, unit="files") as inner:
                inner.advance(1)
                outer.advance(6)
            reporter.note("Warning: slow")
            stage.finish(ran=True, nbytes=10)
        with reporter.task("look", 1):
            pass
    assert [(e.kind, e.stage, e.task, e.done, e.total) for e in events] == [
        ("stage_begin", "quantize", "", 0, None),
        ("task_begin", "quantize", "read", 0, 10),
        ("task_advance", "quantize", "read", 4, 10),
        ("task_begin", "quantize", "write", 0, None),
        ("task_advance", "quantize", "write", 1, None),
        ("task_advance", "quantize", "read", 10, 10),
        ("task_end", "quantize", "write", 1, None),
        ("note", "quantize", "", 0, None),
        ("task_end", "quantize", "read", 10, 10),
        ("stage_end", "quantize", "", 0, None),
        ("task_begin", "", "look", 0, 1),
        ("task_end", "", "look", 0, 1),
    ]
    assert {e.unit for e in events if e.task == "write"} == {"files"}
    assert len({e.task_id for e in events if e.task}) == 3
    assert [e.ran for e in events if e.kind == "stage_end"] == [True]
    assert [e.text for e in events if e.kind == "note"] == ["Warning: slow"]
    assert {(e.stage_number, e.stages) for e in events if e.stage} == {(2, 5)}


def test_a_stage_that_fails_ends_without_a_result() -> None:
    events: list[ProgressEvent] = []

    def work() -> None:
        with reporting_to(events.append) as told, told.stage("verify"), told.task("ask", 3):
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        work()
    assert [e.kind for e in events] == ["stage_begin", "task_begin", "task_end", "stage_end"]
    assert events[-1].ran is None


@pytest.mark.parametrize(
    "kind", ["stage_begin", "task_begin", "task_advance", "note", "task_end", "stage_end"]
)
def test_what_a_callback_raises_ends_the_work_and_is_its_last_call(kind: str) -> None:
    heard: list[str] = []

    def stop(event: ProgressEvent) -> None:
        heard.append(event.kind)
        if event.kind == kind:
            raise KeyError("enough")

    def work() -> None:
        with reporting_to(stop) as reporter, reporter.stage("download") as stage:
            with reporter.task("hash", 2) as task:
                task.advance(2)
                reporter.note("so far")
            stage.finish(ran=True)

    with pytest.raises(KeyError, match="enough"):
        work()
    assert heard[-1] == kind
    assert heard.count(kind) == 1


def test_threads_are_told_of_one_at_a_time_and_done_never_falls() -> None:
    inside: list[int] = []
    done: dict[int, list[int]] = {}

    def callback(event: ProgressEvent) -> None:
        inside.append(1)
        assert len(inside) == 1
        done.setdefault(event.task_id, []).append(event.done)
        inside.pop()

    with reporting_to(callback) as reporter, reporter.task("both", 4000) as shared:

        def work() -> None:
            with reporter.task("own", 500) as own:
                for _ in range(500):
                    own.advance(1)
                    shared.advance(1)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(done) == 9
    assert all(counts == sorted(counts) for counts in done.values())
    assert sorted(counts[-1] for counts in done.values()) == [500] * 8 + [4000]


def test_what_a_callback_raises_is_nobody_elses_error() -> None:
    """A stage takes an OSError for the disk's, and the Hub's client tries again after one."""
    calls: list[str] = []

    def full(event: ProgressEvent) -> None:
        calls.append(event.kind)
        raise OSError("the callback's own")

    def translated() -> None:
        with reporting_to(full) as reporter:
            try:
                reporter.note("one")
            except OSError as error:
                raise ResourceError("Look at the disk.") from error

    def tried_again() -> None:
        with reporting_to(full) as reporter:
            for _ in range(3):
                with contextlib.suppress(OSError):
                    reporter.note("one")

    for work in (translated, tried_again):
        with pytest.raises(OSError, match="the callback's own"):
            work()
    assert calls == ["note", "note"]


def test_an_interrupt_in_a_callback_is_what_the_stage_makes_of_it() -> None:
    def interrupted(_: ProgressEvent) -> None:
        raise KeyboardInterrupt

    def work() -> None:
        with reporting_to(interrupted) as reporter:
            try:
                reporter.note("one")
            except KeyboardInterrupt:
                raise StoppedError("Kept: all.") from None

    with pytest.raises(StoppedError, match="Kept: all"):
        work()


def test_nobody_is_told_without_a_callback() -> None:
    with reporting_to(None) as reporter:
        assert reporter is SILENT


@pytest.mark.parametrize("size", [None, 10], ids=["any size", "of a size"])
@pytest.mark.parametrize(
    ("tries", "done"),
    [
        ([(0, [3, 7])], 10),
        ([(0, [3]), (0, [3, 7])], 10),
        ([(0, [9]), (0, [2]), (0, [1, 1, 1])], 9),  # a try that ends earlier than one before it
        ([(0, [4]), (4, [6])], 10),  # goes on where the last one ended
        ([(0, [4]), (2, [8])], 10),
        ([(0, [10]), (0, [10]), (0, [10])], 10),
        ([(6, [4])], 10),
    ],
)
def test_what_is_tried_again_counts_once(
    tries: list[tuple[int, list[int]]], done: int, size: int | None
) -> None:
    told = ToldTask("read", 10)
    shown = HighWaterTask(told, size)
    for start, amounts in tries:
        shown.restart(start)
        for amount in amounts:
            shown.advance(amount)
    assert told.done == done


def test_a_try_does_not_count_beyond_the_size() -> None:
    told = ToldTask("read", 10)
    shown = HighWaterTask(told, 10)
    shown.advance(7)
    shown.advance(7)
    shown.advance(7)
    assert told.done == 10
