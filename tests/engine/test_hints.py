"""What the engine only suggests to the system may be refused."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import NoReturn

import pytest
from nf4_pipeline.errors import of_system
from nf4_pipeline.job import run_stage
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import QUANTIZE

from tests.support.jobs import CPU, download
from tests.support.tiny import write_falcon

pytestmark = pytest.mark.usefixtures("workers_here")


def refuse(*_: object) -> NoReturn:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


class SmallPagesOnly(mmap.mmap):
    """As a kernel without huge pages maps memory."""

    def madvise(self, *_: int) -> None:
        refuse()


def test_refused_hints_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_falcon(tmp_path / "model")
    recipe = Recipe()
    expected, *_ = download(model, tmp_path / "a")
    run_stage(expected, "quantize", recipe, CPU, SILENT)
    monkeypatch.setattr(os, "posix_fadvise", refuse)
    monkeypatch.setattr(mmap, "mmap", SmallPagesOnly)
    build, *_ = download(model, tmp_path / "b")
    record = run_stage(build, "quantize", recipe, CPU, SILENT).record
    assert record.outputs == expected.need(QUANTIZE).outputs


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_memory_that_runs_out_is_not_the_disk(error: OSError | MemoryError) -> None:
    assert "--memory-budget" in str(of_system(error, "quantize"))
