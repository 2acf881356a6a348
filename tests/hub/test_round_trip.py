"""What is pushed, a stranger downloads: the same bytes, and a model that answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nf4_pipeline
import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.job import run_build
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import load_recipe
from nf4_pipeline.stages.find_source import DownloadRequest

from tests.support.hub_client import isolated
from tests.support.hub_server import HubServer
from tests.support.hub_worker import Worker
from tests.support.jobs import CPU
from tests.support.tiny import content_of, copy_of

PART = 300_000

FETCH = """
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1], revision=sys.argv[2], local_dir=sys.argv[3])
"""


@pytest.fixture(scope="module")
def sample(quick_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of the sample that comes with the package."""
    request = DownloadRequest("sample", tmp_path_factory.mktemp("sample"))
    with in_process():
        build, _ = run_build(request, load_recipe(quick_recipe), CPU, SILENT)
    weights = list(build.export.glob("*.safetensors"))
    assert all(path.stat().st_size > 3 * PART for path in weights)
    return build.root


@pytest.mark.parametrize("part_size", [None, PART], ids=["basic", "multipart"])
def test_round_trip(
    hub: HubServer, worker: Worker, tmp_path: Path, sample: Path, part_size: int | None
) -> None:
    build = Build(copy_of(sample, tmp_path / "build"))
    hub.part_size = part_size
    outcome = worker.push(build.root, "me/model", private=False)
    assert outcome.error == "", outcome.message
    assert (hub.count("POST", "*/complete") > 0) == (part_size is not None)
    assert (hub.count("PUT", "/upload/*") > 2) == (part_size is not None)

    fetched = tmp_path / "fetched"
    done = subprocess.run(
        [sys.executable, "-c", FETCH, "me/model", outcome.value["commit"], str(fetched)],
        env=isolated(tmp_path / "stranger", hub.url),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    there = {
        path: content
        for path, content in content_of(fetched).items()
        if path != ".gitattributes" and not path.startswith(".cache/")
    }
    assert there == content_of(build.export)
    if part_size is not None:
        return  # what answers was seen: the bytes are the same
    (answer,) = nf4_pipeline.prompt("Tell me a story.", fetched, max_new_tokens=5, device="cpu")
    assert isinstance(answer, str)
    expected = nf4_pipeline.prompt("Tell me a story.", build.export, max_new_tokens=5, device="cpu")
    assert [answer] == expected
