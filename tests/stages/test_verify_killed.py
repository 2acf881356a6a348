"""The process that loads a model is killed: one message, and nothing else happened."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.errors import VerificationError
from nf4_pipeline.job import run_stage
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.progress import SILENT, SilentReporter, Task
from nf4_pipeline.recipe import load_recipe
from nf4_pipeline.verification import launch

from tests.support.hub_client import PYTHONPATH
from tests.support.jobs import CPU
from tests.support.processes import eventually, marked
from tests.support.tiny import content_of, copy_of
from tests.support.verified import skip_documents, skip_readers

KILLED = "tests.support.killed_worker"
"""The real worker, which dies in the middle: from here, the kill might come after its reply."""


class _Titles(SilentReporter):
    """A reporter that remembers which tasks began."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def task(
        self, title: str, total: int | None, *, unit: str = "bytes"
    ) -> AbstractContextManager[Task]:
        self.begun.append(title)
        return super().task(title, total, unit=unit)


def test_a_worker_that_is_killed_leaves_what_was_there(
    exported_falcon: Path,
    quick_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mark: str,
) -> None:
    skip_readers(monkeypatch)
    skip_documents(monkeypatch)
    build = Build(copy_of(exported_falcon, tmp_path / "build"))
    recipe = load_recipe(quick_recipe)
    before = content_of(build.export), content_of(build.root / "records")
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)  # the worker of the tests is found by it
    worker = replace(launch._ARTIFACT_WORKER, module=KILLED)
    titles = _Titles()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_ARTIFACT_WORKER", worker)
        with pytest.raises(VerificationError) as raised:
            run_stage(build, "verify", recipe, CPU, titles)
    assert "compare block by block" in titles.begun
    said = str(raised.value)
    assert re.search(f"process that runs {re.escape(str(build.export))} ended with status -9", said)
    assert "memory ran out. End other programs" in said
    assert eventually(lambda: not marked(mark))
    assert (content_of(build.export), content_of(build.root / "records")) == before
    with in_process():
        assert run_stage(build, "verify", recipe, CPU, SILENT).record.facts.verdict == "pass"
