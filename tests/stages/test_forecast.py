"""A build foretold from headers alone: what it says is what is then built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from nf4_pipeline.errors import SourceError, UsageError
from nf4_pipeline.job import plan_build, run_stage
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import QuantizeRecipe, Recipe, SerializeRecipe
from nf4_pipeline.records import QUANTIZE, SERIALIZE, Reading
from nf4_pipeline.stages.download_request import DownloadRequest
from nf4_pipeline.stages.forecast import Forecast

from tests.support.hub_server import TOKEN, HubServer
from tests.support.hub_worker import Worker
from tests.support.jobs import CPU, download
from tests.support.tiny import copy_of, edit_json

pytestmark = pytest.mark.usefixtures("workers_here")


def foretold(model: str | Path, artifacts: Path, recipe: Recipe | None = None) -> Forecast:
    return plan_build(DownloadRequest(str(model), artifacts), recipe or Recipe(), CPU, SILENT)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(quantize=QuantizeRecipe(skip_modules=("transformer.h.0",))),
        Recipe(serialize=SerializeRecipe(max_shard_size="40KB")),
    ],
    ids=["default", "skips a layer", "small files"],
)
def test_what_is_foretold_is_built(recipe: Recipe, tiny_falcon: Path, tmp_path: Path) -> None:
    found = foretold(tiny_falcon, tmp_path, recipe)
    assert not list(tmp_path.iterdir())
    build, *_ = download(tiny_falcon, tmp_path, recipe=recipe)
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, recipe, CPU, SILENT)
    outputs = build.need(QUANTIZE).outputs
    assert {f"quantized/{name}": size for name, size in found.files.items()} == {
        name: digest.size for name, digest in outputs.items()
    }
    assert found.totals == build.need(SERIALIZE).facts.totals
    stored = [path for path in build.root.rglob("*") if path.is_file() and not path.is_symlink()]
    taken = {path.stat().st_ino: path.stat().st_size for path in stored}  # hard links once
    assert sum(taken.values()) <= found.builds.needed
    assert sum(found.kept.values()) == found.totals.kept_bytes
    assert sum(found.dropped.values()) == found.totals.dropped_bytes
    assert found.fits


def test_of_a_checkpoint_that_is_refused(tiny_falcon: Path, tmp_path: Path) -> None:
    """What download would refuse is refused as download would."""
    model = copy_of(tiny_falcon, tmp_path / "model")
    edit_json(model / "config.json", hidden_size=128)
    with pytest.raises(SourceError) as of_download:
        download(model, tmp_path / "artifacts")
    with pytest.raises(SourceError) as of_forecast:
        foretold(model, tmp_path / "artifacts")
    assert str(of_forecast.value) == str(of_download.value)


def test_of_names_that_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        foretold("no such model", tmp_path)


def test_of_what_is_only_known_later(tiny_falcon: Path, tmp_path: Path) -> None:
    request = DownloadRequest(str(tiny_falcon), tmp_path, reading=Reading(strip_prefix="model."))
    with pytest.raises(SourceError, match="only known once the copy without a prefix is made"):
        plan_build(request, Recipe(), CPU, SILENT)


def test_of_a_disk_that_is_too_small(
    tiny_falcon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    found = foretold(tiny_falcon, tmp_path)
    assert found.builds.free == 10**6 < found.builds.needed
    assert not found.fits


@pytest.fixture
def hub(tiny_falcon: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.store.users[TOKEN] = "me"
        server.store.add("me/tiny", tiny_falcon)
        yield server


def test_of_a_hub_model_no_weights_are_fetched(
    hub: HubServer, tiny_falcon: Path, tmp_path: Path
) -> None:
    weights = sum(path.stat().st_size for path in tiny_falcon.glob("*.safetensors"))
    with Worker(tmp_path / "hf", hub.url, HF_TOKEN=TOKEN) as worker:
        done = worker.nf4(tmp_path, "build", "me/tiny", "--dry-run", "--json")
        assert done.status == 0, done.err
        found = Forecast.from_json(json.loads(done.out))
        cached = [path for path in (tmp_path / "hf").rglob("*") if path.is_file()]
        assert not any(path.stat().st_size > weights // 4 for path in cached)
        assert not (tmp_path / "artifacts").exists()
        assert found.fetch_bytes == found.source_bytes == weights
        assert found.source.commit is not None
        assert found.build.endswith(f"me--tiny@{found.source.commit[:12]}")

        assert worker.nf4(tmp_path, "download", "me/tiny").status == 0
        done = worker.nf4(tmp_path, "build", "me/tiny", "--dry-run")
        assert done.status == 0
        assert "all in the Hub cache" in done.out
        assert done.out.count("\n") < 20
