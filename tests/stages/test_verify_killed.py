"""The process that loads a model is killed: one message, and nothing else happened."""

from __future__ import annotations

import os
import re
import signal
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.errors import VerificationError
from nf4_pipeline.job import run_stage
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.progress import SILENT, SilentReporter, Task
from nf4_pipeline.recipe import load_recipe

from tests.support.jobs import CPU
from tests.support.tiny import content_of, copy_of
from tests.support.verified import skip_documents, skip_readers


class _Killer(SilentReporter):
    """A reporter that kills the worker once it is a little way into a certain task.

    Not when the task begins: the model is then built from a config, and that is a phase with a
    message of its own.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self.killed: list[int] = []

    def task(
        self, title: str, total: int | None, *, unit: str = "bytes"
    ) -> AbstractContextManager[Task]:
        if title == self._title:
            return nullcontext(self)
        return super().task(title, total, unit=unit)

    def advance(self, amount: int) -> None:
        if not self.killed:
            (pid,) = _workers()
            os.kill(pid, signal.SIGKILL)
            self.killed.append(pid)


def _workers() -> list[int]:
    """The pids of workers that this process started and that run."""
    pids = []
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            pids += [int(pid)] if b"nf4_pipeline.verification." in command else []
    return pids


def test_a_worker_that_is_killed_leaves_what_was_there(
    exported_falcon: Path, quick_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_readers(monkeypatch)
    skip_documents(monkeypatch)
    build = Build(copy_of(exported_falcon, tmp_path / "build"))
    recipe = load_recipe(quick_recipe)
    before = content_of(build.export), content_of(build.root / "records")
    killer = _Killer("compare block by block")
    with pytest.raises(VerificationError) as raised:
        run_stage(build, "verify", recipe, CPU, killer)
    assert len(killer.killed) == 1
    said = str(raised.value)
    places = "|".join(re.escape(str(place)) for place in (build.export, build.source))
    assert re.search(f"The process that runs ({places}) ended with status -9", said)
    assert "memory ran out. End other programs" in str(raised.value)
    assert _workers() == []
    assert (content_of(build.export), content_of(build.root / "records")) == before
    with in_process():
        assert run_stage(build, "verify", recipe, CPU, SILENT).record.facts.verdict == "pass"
