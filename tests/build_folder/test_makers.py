"""Several processes in one build folder: who holds it, who makes what, and who did before."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Final

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.errors import BuildError

from tests.support.tiny import environment

NAME: Final = "model-00001-of-00002.safetensors"
MAKER: Final = """
import sys, time
from pathlib import Path
from nf4_pipeline.build_folder import Build
with Build(Path(sys.argv[1])).shared(), Build(Path(sys.argv[1])).making(sys.argv[2:]):
    print("begun", flush=True)
    time.sleep(600)
"""


def start_maker(root: Path, *names: str) -> subprocess.Popen[str]:
    """A process that has begun to make files, and makes them until it is killed."""
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKER, root, *names],
        env=environment(root),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert maker.stdout is not None
    assert maker.stdout.readline() == "begun\n"
    return maker


def kill(maker: subprocess.Popen[str]) -> None:
    os.kill(maker.pid, signal.SIGKILL)
    maker.communicate(timeout=60)


def test_who_makes_what_is_seen_and_outlives_a_kill(tmp_path: Path) -> None:
    build = Build(tmp_path)
    assert build.makers() == {}
    first = start_maker(tmp_path, NAME, "other")
    host = socket.gethostname()
    for name in (NAME, "other"):
        makers = build.makers()[name]
        assert (makers.begun, makers.pid, makers.host) == (1, first.pid, host)
        assert makers.may_live
    owner = rf"{NAME} is in use by another nf4 process \(pid {first.pid} on {host}\)"
    with pytest.raises(BuildError, match=owner), build.making([NAME]):
        pass
    kill(first)
    assert not build.makers()[NAME].may_live
    with build.shared(), build.making([NAME]):
        again = build.makers()[NAME]
        assert (again.begun, again.pid, again.may_live) == (2, os.getpid(), True)
    with build.locked():
        assert build.makers() == {}


def test_a_maker_may_be_waited_for(tmp_path: Path) -> None:
    build, maker = Build(tmp_path), start_maker(tmp_path, NAME)
    threading.Timer(0.3, kill, [maker]).start()
    with build.making([NAME], patience=60):
        assert build.makers()[NAME].begun == 2


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\n", b"x on y\n", b"12\n", b"-1 on \n"])
def test_any_lock_file_can_be_looked_at(content: bytes, tmp_path: Path) -> None:
    (tmp_path / f".lock.{NAME}").write_bytes(content)
    for makers in Build(tmp_path).makers().values():
        assert makers.begun == 1
        assert makers.may_live in (True, False)
    with Build(tmp_path).making([NAME]):
        assert Build(tmp_path).makers()[NAME].pid == os.getpid()


def test_what_is_locked_can_be_lent(tmp_path: Path) -> None:
    build, helper = Build(tmp_path), Build(tmp_path)
    with build.locked():
        with pytest.raises(BuildError, match="in use"), helper.shared():
            pass
        with build.lent():
            with helper.shared(), helper.making([NAME]):
                (tmp_path / "quantized").mkdir()
                (tmp_path / "quantized" / f".{NAME}.partial").write_text("half")
            with pytest.raises(BuildError, match="in use"), helper.locked():
                pass
        assert not list((tmp_path / "quantized").iterdir())  # a dead helper's
        assert build.makers() == {}
        with pytest.raises(BuildError, match="in use"), helper.shared():
            pass
    with helper.locked():
        pass
    with pytest.raises(RuntimeError, match="locked"), build.lent():
        pass


def test_a_helper_that_still_works_is_waited_for(tmp_path: Path) -> None:
    build = Build(tmp_path)
    with build.locked():
        with build.lent():
            maker = start_maker(tmp_path, NAME)
            threading.Timer(0.3, kill, [maker]).start()
            begun = time.monotonic()
        assert time.monotonic() - begun > 0.2
        assert maker.wait(10) == -signal.SIGKILL  # a moment after its lock is gone


def test_what_fails_while_it_is_lent_is_raised_as_it_is(tmp_path: Path) -> None:
    """At once, whether helpers still work or not; and no lock stays."""
    build, helper = Build(tmp_path), Build(tmp_path)

    def fail() -> None:
        with build.locked(), build.lent(), helper.shared():
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    with helper.locked():
        pass
