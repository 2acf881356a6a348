"""Workers that are forked from a process that has imported: as any worker, only sooner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from nf4_pipeline.errors import ArchitectureError
from nf4_pipeline.processes import forked
from nf4_pipeline.processes.forked import serving
from nf4_pipeline.processes.messages import Limits
from nf4_pipeline.processes.parent_side import ChildFailed, Session, Waiting, run, start
from nf4_pipeline.processes.worker import Environment, Worker

from tests.processes.example_worker import EXAMPLE, PATHS, Order, Outcome
from tests.support.processes import children_of, eventually, is_gone

SLOW = "tests.processes.slow_import"


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PATHS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def server() -> Iterator[int]:
    """The process id of a server of the example worker."""
    with serving([EXAMPLE.module]):
        assert forked._current is not None
        yield forked._current.pid


def ask(deed: str, text: str = "", worker: Worker[Order, Outcome] = EXAMPLE) -> Outcome:
    return run(worker, Order(deed, text))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def eventually_gone(*pids: int) -> bool:
    return eventually(lambda: all(map(is_gone, pids)))


def test_a_fork_is_a_process_of_its_own(server: int) -> None:
    with start(EXAMPLE, Order("sleep")) as child:
        assert eventually(lambda: child.is_speaking)
        (pid,) = children_of(server)
        assert parent_of(pid) == server
    assert eventually_gone(pid)
    first, second = ask("progress", "a"), ask("progress", "b")
    assert first.pid != second.pid
    assert (first.text, second.text) == ("a", "b")


def test_what_a_worker_raises_and_how_it_dies(server: int) -> None:
    with pytest.raises(ArchitectureError, match="no such thing"):
        ask("refuse", "no such thing")
    with pytest.raises(ChildFailed, match="PanicException: range end index 8 out of range: x") as f:
        ask("panic", "x")
    assert f.value.status == 1
    with pytest.raises(ChildFailed, match="first words / last words") as failed:
        ask("die", str(int(signal.SIGSEGV)))
    assert failed.value.status == -signal.SIGSEGV
    assert ask("progress", "still there").text == "still there"


def test_limits_are_those_of_the_fork_alone(server: int) -> None:
    limited = replace(EXAMPLE, limits=Limits(processor_seconds=7, data_bytes=2**30))
    assert ask("limits", worker=limited).text == "7"
    with pytest.raises(ChildFailed, match="MemoryError"):
        ask("allocate", str(2**31), worker=limited)
    assert ask("limits").text != "7"
    slow = replace(EXAMPLE, limits=Limits(seconds=0.3))
    with pytest.raises(ChildFailed) as failed:
        ask("sleep", worker=slow)
    assert failed.value.timed_out


def test_each_has_a_temporary_folder_that_goes_with_it(server: int) -> None:
    first, second = Path(ask("temporary").text), Path(ask("temporary").text)
    assert first.parent != second.parent
    assert not first.exists()
    assert not first.parent.exists()


def test_the_environment_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 20)
    monkeypatch.setenv("HARMLESS", "yes")
    worker = replace(EXAMPLE, environment=Environment(add={**PATHS, "MORE": "1"}))
    with serving([EXAMPLE.module]):
        seen = dict(
            line.split("=", 1) for line in ask("environment", worker=worker).text.split("\n")
        )
    assert "HF_TOKEN" not in seen
    assert (seen["HARMLESS"], seen["MORE"]) == ("yes", "1")


def test_what_is_printed_comes_between_no_two_messages(server: int) -> None:
    assert ask("print", "to stdout").text == "to stdout"


def test_several_at_once_and_sessions(server: int) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: ask("progress", str(n)).text, range(12)))
    assert found == [str(n) for n in range(12)]
    session = Session(EXAMPLE)
    pids = {session.ask(Order("progress", "x")).pid for _ in range(3)}
    assert len(pids) == 1
    session.close()
    assert eventually_gone(*pids)


def test_one_that_waits_and_is_never_asked(server: int) -> None:
    with Waiting(EXAMPLE):
        assert eventually(lambda: children_of(server))
        begun = children_of(server)
    assert eventually_gone(*begun)


def test_nobody_waits_for_a_server_that_still_imports() -> None:
    begin = time.monotonic()
    with serving([SLOW]):
        child = start(replace(EXAMPLE, module=SLOW), Order("progress"))
        child.close()
    assert time.monotonic() - begin < 120  # it imports for ten minutes


def test_a_worker_of_another_module_is_started_as_ever(server: int) -> None:
    other = replace(EXAMPLE, module="tests.processes.other_worker")
    with pytest.raises(ChildFailed, match="No module named"):
        ask("progress", worker=other)


def test_a_server_with_a_thread_starts_workers_anew() -> None:
    """A fork would lack the thread, and whatever it holds locked."""
    with serving(["tests.processes.threaded_import", EXAMPLE.module]):
        first, second = ask("arguments"), ask("progress", "x")
        assert "child_side" in first.text
        assert second.text == "x"


def test_a_server_that_dies_takes_its_forks_along(server: int) -> None:
    child = start(EXAMPLE, Order("sleep"))
    assert eventually(lambda: child.is_speaking)
    pids = children_of(server)
    os.kill(server, signal.SIGKILL)
    with pytest.raises(ChildFailed):
        child.wait()
    child.close()
    assert eventually_gone(*pids)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_neither_outlives_the_program(number: signal.Signals) -> None:
    program = textwrap.dedent(
        """
        import json, os
        from nf4_pipeline.processes import forked
        from nf4_pipeline.processes.parent_side import start
        from tests.processes.example_worker import EXAMPLE, Order

        with forked.serving([EXAMPLE.module]):
            child = start(EXAMPLE, Order("sleep"))
            while not child.is_speaking:
                pass
            print(json.dumps(forked._current.pid), flush=True)
            child.wait()
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdout is not None
            server = json.loads(parent.stdout.readline())
            (worker,) = children_of(server)
            parent.send_signal(number)
            parent.wait(120)
        finally:
            parent.kill()
    assert eventually_gone(server, worker)


def test_threads_that_wait_for_different_forks(server: int) -> None:
    done: list[str] = []

    def wait(text: str) -> None:
        done.append(ask("progress", text).text)

    with start(EXAMPLE, Order("sleep")):
        threads = [threading.Thread(target=wait, args=(str(n),)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert sorted(done) == ["0", "1", "2", "3"]


def test_what_libraries_leave_as_they_are_imported_goes_with_the_server() -> None:
    with serving([EXAMPLE.module]):
        assert forked._current is not None
        environment = Path(f"/proc/{forked._current.pid}/environ")
        # It may just be being started.
        assert eventually(lambda: b"TMPDIR=" in environment.read_bytes())
        said = environment.read_bytes()
        variables = dict(v.split(b"=", 1) for v in said.split(b"\0") if v)
        folder = Path(variables[b"TMPDIR"].decode())
        assert folder.is_dir()
    assert not folder.exists()
