"""A child that is asked again and again."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from nf4_pipeline.errors import ArchitectureError
from nf4_pipeline.processes import parent_side
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.processes.parent_side import ChildFailed, Session
from nf4_pipeline.progress import SilentReporter, Task

from tests.processes.example_worker import EXAMPLE, Order, Outcome


class InterruptSoon(SilentReporter):
    """A reporter with which this process is interrupted while its child sleeps, and not before."""

    def task(
        self, title: str, total: int | None, *, unit: str = "bytes"
    ) -> AbstractContextManager[Task]:
        if title == "sleep":
            threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
        return super().task(title, total, unit=unit)


@pytest.fixture
def session() -> Iterator[Session[Order, Outcome]]:
    found = Session(EXAMPLE)
    yield found
    found.close()


def test_it_remembers_and_an_error_of_ours_is_no_end(session: Session[Order, Outcome]) -> None:
    first = session.ask(Order("remember", "a"))
    with pytest.raises(ArchitectureError, match="no head"):
        session.ask(Order("refuse", "no head"))
    second = session.ask(Order("remember", "b" * 100_000))  # more than a pipe holds
    assert second.text == "a " + "b" * 100_000
    assert first.pid == second.pid != os.getpid()
    assert session.is_usable


@pytest.mark.parametrize("deed", ["panic", "exit", "die"])
def test_what_is_no_error_of_ours_ends_it(deed: str, session: Session[Order, Outcome]) -> None:
    with pytest.raises(ChildFailed):
        session.ask(Order(deed, "9"))
    assert not session.is_usable


def test_a_child_that_died_meanwhile_is_known(session: Session[Order, Outcome]) -> None:
    pid = session.ask(Order("remember", "a")).pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ChildFailed) as caught:
        session.ask(Order("remember", "b"))
    assert caught.value.status == -signal.SIGKILL
    assert not session.is_usable


def test_the_thread_that_began_it_may_end() -> None:
    made: list[Session[Order, Outcome]] = []
    thread = threading.Thread(target=lambda: made.append(Session(EXAMPLE)))
    thread.start()
    thread.join()
    try:
        assert made[0].ask(Order("remember", "a")).text == "a"
        assert made[0].ask(Order("remember", "b")).text == "a b"
    finally:
        made[0].close()
    assert not made[0].is_usable


def test_an_interrupt_ends_it(session: Session[Order, Outcome]) -> None:
    """Else the next request would get the reply to the one that was given up."""
    pid = session.ask(Order("remember", "a")).pid
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            session.ask(Order("sleep"), InterruptSoon())
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert not session.is_usable
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_interrupt_while_it_begins_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command may end right after it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    begin = parent_side._Process._begin
    begun: list[Any] = []

    def slowly(self: Any, environment: dict[str, str]) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        begun.append(begin(self, environment))
        return begun[0]

    monkeypatch.setattr(parent_side._Process, "_begin", slowly)
    monkeypatch.setattr(parent_side, "_BEGINS", 120.0)  # on a machine that is busy
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Session(EXAMPLE)
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert begun[0].poll() == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_in_this_process() -> None:
    with in_process():
        session = Session(EXAMPLE)
        assert session.ask(Order("progress", "x")).pid == os.getpid()
        assert session.is_usable
    assert not session.is_usable
