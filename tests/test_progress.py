"""A progress callback: what it hears of, in which order, and what becomes of what it raises."""

from __future__ import annotations

import threading

import pytest
from nf4_pipeline.progress import SILENT, ProgressEvent, as_reporter


def test_stages_tasks_and_notes_are_told_in_order() -> None:
    events: list[ProgressEvent] = []
    reporter = as_reporter(events.append)
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
    reporter = as_reporter(events.append)
    with pytest.raises(OSError, match="disk"), reporter.stage("verify"), reporter.task("ask", 3):
        raise OSError("disk")
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
        reporter = as_reporter(stop)
        with reporter.stage("download") as stage:
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

    reporter = as_reporter(callback)
    with reporter.task("both", 4000) as shared:

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


def test_nobody_is_told_without_a_callback() -> None:
    assert as_reporter(None) is SILENT
