"""What stands in for a worker in most tests of commands is, from outside, that worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import warm
from tests.support.processes import command_of, eventually, is_gone
from tests.support.tiny import content_of, environment, nf4

PROBE = "nf4_pipeline.model.probe_worker"
WORKER = [sys.executable, "-P", "-m", "nf4_pipeline.processes.child_side", PROBE]


@contextmanager
def worker(env: dict[str, str], cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that waits for its request."""
    pipe = subprocess.PIPE
    with subprocess.Popen(WORKER, env=env, cwd=cwd, stdin=pipe, stdout=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def forks(folder: Path) -> set[int]:
    """Processes that work in a folder under another's name."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            works_here = (path / "cwd").readlink() == folder
        except OSError:
            continue
        if works_here and b"tests.support.warm" in command_of(int(path.name)):
            found.add(int(path.name))
    return found


def own(cwd: Path, **variables: str) -> dict[str, str]:
    """What a worker of an `nf4` finds."""
    offline = {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_OIDC_RESOURCE": "", "PYTHONOPTIMIZE": ""}
    return warm.variables(environment(cwd) | offline | variables)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_fork_ends_with_it(tmp_path: Path, number: signal.Signals) -> None:
    with worker(own(tmp_path), tmp_path) as process:
        assert eventually(lambda: forks(tmp_path))
        (fork,) = forks(tmp_path)
        assert command_of(process.pid)[1:5] == [word.encode() for word in WORKER[1:]]
        process.send_signal(number)
        assert process.wait(60) == -number
        assert eventually(lambda: is_gone(fork))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGXCPU, signal.SIGSEGV])
def test_it_ends_as_the_fork_does(tmp_path: Path, number: signal.Signals) -> None:
    with worker(own(tmp_path), tmp_path) as process:
        assert eventually(lambda: forks(tmp_path))
        (fork,) = forks(tmp_path)
        os.kill(fork, number)
        assert process.wait(60) == -number


def test_nobody_asks(tmp_path: Path) -> None:
    with worker(own(tmp_path), tmp_path) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 1


@pytest.mark.parametrize(
    "variables", [{"OMP_NUM_THREADS": "3"}, {"TRANSFORMERS_VERBOSITY": "debug"}, {"LC_ALL": "C"}]
)
def test_another_environment_is_imported_in(tmp_path: Path, variables: dict[str, str]) -> None:
    with worker(own(tmp_path, **variables), tmp_path) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        assert eventually(lambda: "libtorch" in maps.read_text())  # it imports for itself
        assert forks(tmp_path) == set()


def test_the_same_comes_of_it(tiny_falcon: Path, tmp_path: Path) -> None:
    records = []
    for cold in (False, True):
        done = nf4("download", tiny_falcon, "--build-dir", "build", cwd=tmp_path, cold=cold)
        assert done.status == 0, done.err
        content = content_of(tmp_path / "build" / "records")
        facts = {name: json.loads(text)["facts"] for name, text in content.items()}
        records.append(facts)
        (tmp_path / "build").rename(tmp_path / str(cold))
    assert records[0] == records[1] != {}
