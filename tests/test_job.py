"""What makes a stage stale, what heals it, and that bytes depend on source and recipe alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.errors import PipelineError
from nf4_pipeline.job import run_stage, states
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import QuantizeRecipe, Recipe, SerializeRecipe
from nf4_pipeline.records import QUANTIZE
from safetensors.torch import load_file

from tests.support.jobs import CPU, download
from tests.support.tiny import SHARDS, content_of, copy_of, flip_byte

pytestmark = pytest.mark.usefixtures("workers_here")

RECIPE = Recipe()


@pytest.fixture
def build(downloaded_falcon: Path, tmp_path: Path) -> Build:
    """A build with all stages but verify, in which export/ links to quantized/."""
    made = Build(copy_of(downloaded_falcon, tmp_path / "build"))
    for stage in ("quantize", "serialize"):
        assert run_stage(made, stage, RECIPE, CPU, SILENT).ran
    return made


def statuses(build: Build, recipe: Recipe = RECIPE) -> list[str]:
    """Of download, quantize and serialize."""
    found = states(build, recipe, CPU)
    return [str(found[stage].status) for stage in ("download", "quantize", "serialize")]


def replace_file(path: Path) -> None:
    """Changes a byte of a file without touching others that share its bytes."""
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").replace(path)
    flip_byte(path)


CHANGES: dict[str, tuple[Callable[[Build], None], list[str], list[bool]]] = {
    "nothing": (lambda b: None, ["done", "done", "done"], [False, False]),
    "a weight file of the export": (
        lambda b: replace_file(b.export / SHARDS[0]),
        ["done", "done", "stale"],
        [False, True],
    ),
    "a weight file of the export and quantized, which share it": (
        lambda b: flip_byte(b.export / SHARDS[0]),
        ["done", "stale", "stale"],
        [True, True],
    ),
    "a quantized file": (
        lambda b: replace_file(b.quantized / SHARDS[1]),
        ["done", "stale", "stale"],
        [True, False],  # what the export holds is still right
    ),
    "the config of the export": (
        lambda b: flip_byte(b.export / "config.json"),
        ["done", "done", "stale"],
        [False, True],
    ),
    "the manifest": (
        lambda b: flip_byte(b.export / "manifest.json"),
        ["done", "done", "stale"],
        [False, True],
    ),
    "a quantized file is gone": (
        lambda b: (b.quantized / SHARDS[0]).unlink(),
        ["done", "stale", "stale"],
        [True, False],
    ),
    "the export is gone": (
        lambda b: shutil.rmtree(b.export),
        ["done", "done", "stale"],
        [False, True],
    ),
    "the record of quantize is of other inputs": (
        lambda b: b.write_record(replace(b.need(QUANTIZE), key="")),
        ["done", "stale", "stale"],
        [True, False],
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_seen_and_healed(build: Build, case: str) -> None:
    change, expected, ran = CHANGES[case]
    exported, quantized = content_of(build.export), content_of(build.quantized)
    change(build)
    assert statuses(build) == expected
    found = [run_stage(build, s, RECIPE, CPU, SILENT).ran for s in ("quantize", "serialize")]
    assert found == ran
    assert statuses(build) == ["done", "done", "done"]
    assert content_of(build.export) == exported
    assert content_of(build.quantized) == quantized


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1}', '{"version": 99}'])
def test_a_record_that_cannot_be_read_counts_as_none(build: Build, text: str) -> None:
    (build.root / "records" / "quantize.json").write_text(text)
    assert statuses(build) == ["done", "missing", "stale"]
    assert run_stage(build, "quantize", RECIPE, CPU, SILENT).ran
    assert statuses(build) == ["done", "done", "done"]


def test_the_recipe_makes_only_the_stages_stale_that_read_it(build: Build) -> None:
    cut = Recipe(serialize=SerializeRecipe("30KB"))
    assert statuses(build, cut) == ["done", "done", "stale"]
    skip = Recipe(quantize=QuantizeRecipe(("h.0",)))
    assert statuses(build, skip) == ["done", "stale", "stale"]


def test_smaller_shards_hold_the_same_tensors(build: Build) -> None:
    before = {n: t for f in SHARDS for n, t in load_file(build.export / f).items()}
    cut = Recipe(serialize=SerializeRecipe("30KB"))
    run_stage(build, "serialize", cut, CPU, SILENT, replaces=True)
    files = sorted(path.name for path in build.export.glob("*.safetensors"))
    assert len(files) > 2
    after = {n: t for f in files for n, t in load_file(build.export / f).items()}
    assert set(after) == set(before)
    assert all(after[n].equal(before[n]) for n in before)
    index = json.loads((build.export / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(before)


@pytest.mark.parametrize("limit", ["5GB", "30KB"])
def test_serialize_does_not_publish_damaged_weights(build: Build, limit: str) -> None:
    """Alone, too: whoever runs one stage must not get a manifest that vouches for wrong bytes."""
    replace_file(build.quantized / SHARDS[0])
    cut = Recipe(serialize=SerializeRecipe(limit))
    shutil.rmtree(build.export)
    with pytest.raises(PipelineError, match=SHARDS[0]):
        run_stage(build, "serialize", cut, CPU, SILENT, replaces=True)


def test_quantize_does_not_take_a_source_that_changed(tiny_falcon: Path, tmp_path: Path) -> None:
    """The source is only linked; what was hashed must be what is quantized."""
    model = copy_of(tiny_falcon, tmp_path / "model")
    made, *_ = download(model, tmp_path / "artifacts")
    flip_byte(model / SHARDS[0], -2)
    assert statuses(made) == ["stale", "missing", "missing"]
    with pytest.raises(PipelineError, match=SHARDS[0]):
        run_stage(made, "quantize", RECIPE, CPU, SILENT)


def test_two_builds_of_one_source_are_equal_byte_for_byte(
    build: Build, tiny_falcon: Path, tmp_path: Path
) -> None:
    elsewhere = copy_of(tiny_falcon, tmp_path / "elsewhere" / tiny_falcon.name)
    other, *_ = download(elsewhere, tmp_path / "other")
    for stage in ("quantize", "serialize"):
        run_stage(other, stage, Recipe(), replace(CPU, workers=1), SILENT)
    assert content_of(other.export) == content_of(build.export)
    assert {"manifest.json", "config.json", *SHARDS} <= set(content_of(other.export))


def test_the_manifest_says_nothing_of_where_it_was_made(build: Build, tiny_falcon: Path) -> None:
    text = (build.export / "manifest.json").read_text()
    for private in (str(build.root), str(tiny_falcon.parent), str(Path.home())):
        assert private not in text


def test_weights_that_are_the_same_file_are_not_stored_twice(build: Build) -> None:
    for name in SHARDS:
        assert (build.export / name).samefile(build.quantized / name)
