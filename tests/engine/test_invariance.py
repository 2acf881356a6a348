"""The bytes depend on the source and the recipe alone, not on how the work was divided."""

from __future__ import annotations

from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.job import run_stage
from nf4_pipeline.machine import Machine
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import QUANTIZE

from tests.support.jobs import download
from tests.support.tiny import copy_of, write_falcon

pytestmark = pytest.mark.usefixtures("workers_here")


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of several chunks each: 1536 x 384 and 6144 x 1536 in bf16 are up to 18 MB."""
    folder = tmp_path_factory.mktemp("invariance")
    model = write_falcon(folder / "model", hidden=1536, layers=1)
    build, *_ = download(model, folder / "artifacts")
    run_stage(build, "quantize", Recipe(), Machine(device="cpu", workers=1), SILENT)
    return build.root


def hashes(build: Build) -> dict[str, str]:
    return {name: digest.sha256 for name, digest in build.need(QUANTIZE).outputs.items()}


@pytest.mark.parametrize(
    ("workers", "budget"),
    [(2, 256 * 2**20), (16, 256 * 2**20), (2, 2 * 2**20), (2, 64 * 2**20), (16, 2 * 2**30)],
)
def test_any_number_of_threads_and_any_budget(
    workers: int, budget: int, downloaded: Path, tmp_path: Path
) -> None:
    build = Build(copy_of(downloaded, tmp_path / "build"))
    expected = hashes(build)
    build.forget(QUANTIZE)
    for path in build.quantized.iterdir():
        path.unlink()
    machine = Machine(device="cpu", workers=workers, memory_budget=budget)
    assert run_stage(build, "quantize", Recipe(), machine, SILENT).ran
    assert hashes(build) == expected
