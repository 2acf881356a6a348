"""What is noted of files that the Hub alone has is not lost by a command that is refused."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.build_folder.sent import note_sent
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.errors import BuildError
from nf4_pipeline.job import run_build, run_stage
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import QuantizeRecipe, Recipe
from nf4_pipeline.stages.download_request import DownloadRequest

from tests.support.jobs import CPU, download

pytestmark = pytest.mark.usefixtures("workers_here")


@pytest.mark.parametrize("refused", ["another recipe", "in use"])
def test_a_build_that_is_refused_forgets_nothing(
    refused: str, tiny_falcon: Path, tmp_path: Path
) -> None:
    root = tmp_path / "build"
    build, *_ = download(tiny_falcon, tmp_path, build_dir=root)
    run_stage(build, "quantize", Recipe(), CPU, SILENT)
    note_sent(root, "https://hub/me/model", FileDigest.of(b"sent"))
    other = Recipe(QuantizeRecipe(skip_modules=("h.0",)))
    request = DownloadRequest(str(tiny_falcon), build_dir=root, check=False)
    in_use = refused == "in use"
    with (
        Build(root).locked() if in_use else nullcontext(),
        pytest.raises(BuildError, match="in use" if in_use else "another build"),
    ):
        run_build(request, Recipe() if in_use else other, CPU, SILENT)
    assert Build(root).sent.has(FileDigest.of(b"sent"))
