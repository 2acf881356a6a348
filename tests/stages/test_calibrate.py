"""Calibrating as part of a build: when it is stale, what is kept, what a stopped run leaves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from nf4_pipeline.build_folder import Build
from nf4_pipeline.calibration.calibrator import TOKENS_FILE, Calibrator
from nf4_pipeline.errors import BuildError, UsageError
from nf4_pipeline.job import run_stage, states
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import QuantizeRecipe, Recipe
from nf4_pipeline.records import QUANTIZE, SERIALIZE
from nf4_pipeline.stages import quantize
from nf4_pipeline.stages.quantize import Quantize

from tests.support.calibrated import (
    bytes_of,
    downloaded,
    manifest_of,
    quantized,
    settings,
    shorten_context,
)
from tests.support.jobs import CPU
from tests.support.tiny import copy_of, flip_byte, write_falcon

pytestmark = pytest.mark.usefixtures("workers_here")

BLOCKS: Final = [f"transformer.h.{number}.safetensors" for number in range(4)]
SELF: Final = settings()
NEAREST: Final = settings("")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of four blocks in two shards of which only `download` is done (see `copy_of`)."""
    folder = tmp_path_factory.mktemp("fresh")
    model = write_falcon(folder / "model", layers=4)
    shorten_context(model)
    return downloaded(model, folder).root


@pytest.fixture(scope="module")
def done(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, calibrated and serialized (see `copy_of`)."""
    build = Build(copy_of(fresh, tmp_path_factory.mktemp("done") / "build"))
    quantized(build, SELF)
    return build.root


@pytest.fixture
def build(fresh: Path, tmp_path: Path) -> Build:
    return Build(copy_of(fresh, tmp_path / "build"))


def write_text(folder: Path, name: str = "text.txt", shift: int = 0) -> Path:
    path = folder / name
    path.write_text("".join(chr(32 + (i * i + shift) % 90) for i in range(3000)))
    return path


class StoppedHere(Exception):
    """Stands for whatever ends a run."""


def stop_before_writing(build: Build, options: Recipe = SELF) -> Path:
    """Runs until all is chosen and nothing is written; returns where the choices are."""

    def stop(*_: Any) -> None:
        raise StoppedHere

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Quantize, "_quantize", stop)
        with pytest.raises(StoppedHere):
            run_stage(build, "quantize", options, CPU, SILENT, replaces=True)
    return choices_of(build)


def choices_of(build: Build) -> Path:
    """The folder of what was chosen."""
    (folder,) = (path for path in build.calibration.iterdir() if path.is_dir())
    assert sorted(path.name for path in folder.iterdir()) == BLOCKS
    return folder


@pytest.fixture(scope="module")
def all_chosen(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build in which all is chosen and nothing is written (see `copy_of`)."""
    build = Build(copy_of(fresh, tmp_path_factory.mktemp("chosen") / "build"))
    stop_before_writing(build)
    return build.root


@pytest.fixture
def chosen(all_chosen: Path, tmp_path: Path) -> Build:
    return Build(copy_of(all_chosen, tmp_path / "chosen"))


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def age(folder: Path) -> dict[str, int]:
    """Makes files old, so that one that is written again is noticed."""
    for path in folder.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    return times(folder)


def test_twice_from_nothing_the_same_bytes(build: Build, done: Path) -> None:
    assert quantized(build, SELF).ran
    assert bytes_of(build) == bytes_of(Build(done))
    assert not quantized(build, SELF).ran
    left = [path.name for path in build.calibration.iterdir()]
    assert left == ["tokens.json"]  # choices are not kept: they stand in quantized/


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_of_torch_do_not_matter(build: Build, done: Path, threads: int) -> None:
    """Tokens are given: how many threads sample them does change what they are."""
    shutil.copytree(Build(done).calibration, build.calibration)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        quantized(build, SELF)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert bytes_of(build) == bytes_of(Build(done))


def test_the_engine_does_not_matter(build: Build, done: Path) -> None:
    quantized(build, SELF, machine=replace(CPU, workers=3, memory_budget=2_100_000))
    assert bytes_of(build) == bytes_of(Build(done))


def test_a_memory_budget_that_is_too_small_is_refused_first(build: Build) -> None:
    with pytest.raises(UsageError, match="memory budget of 300,000 bytes is too small"):
        quantized(build, SELF, machine=replace(CPU, memory_budget=300_000))
    assert not build.calibration.exists()


def test_a_run_goes_on_where_it_stopped(build: Build, done: Path) -> None:
    folder = stop_before_writing(build)
    before = age(folder)
    assert build.record(QUANTIZE) is None
    stop_before_writing(build)
    assert times(folder) == before  # nothing is chosen a second time
    (folder / BLOCKS[1]).unlink()
    stop_before_writing(build)
    after = times(folder)
    assert {name for name in BLOCKS if after[name] != before[name]} == {BLOCKS[1]}
    quantized(build, SELF)
    assert bytes_of(build) == bytes_of(Build(done))


def cut(folder: Path) -> None:
    path = folder / BLOCKS[2]
    path.write_bytes(path.read_bytes()[:-100])


def empty(folder: Path) -> None:
    (folder / BLOCKS[2]).write_bytes(b"")


def grown(folder: Path) -> None:
    path = folder / BLOCKS[2]
    path.write_bytes(path.read_bytes() + b"\0" * 64)


def another_block(folder: Path) -> None:
    shutil.copy(folder / BLOCKS[1], folder / BLOCKS[2])


def another_byte(folder: Path) -> None:
    flip_byte(folder / BLOCKS[2], -5)


def no_notes(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(folder / BLOCKS[2]), folder / BLOCKS[2])


def other_notes(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(folder / BLOCKS[2]), folder / BLOCKS[2], metadata={"nf4": "[1]"})


@pytest.mark.parametrize(
    "damage", [cut, empty, grown, another_block, another_byte, no_notes, other_notes]
)
def test_a_block_that_is_not_what_was_written_is_not_believed(
    chosen: Build, done: Path, damage: Callable[[Path], None]
) -> None:
    folder = choices_of(chosen)
    damage(folder)
    before = age(folder)
    stop_before_writing(chosen)
    after = times(folder)
    assert {name for name in BLOCKS if after[name] != before[name]} == {BLOCKS[2]}
    quantized(chosen, SELF)
    assert bytes_of(chosen) == bytes_of(Build(done))


def test_what_does_not_belong_there_is_not_used(chosen: Build, done: Path) -> None:
    """A stranger that holds other codes for a weight, and what another calibration left."""
    folder = choices_of(chosen)
    shutil.copy(folder / BLOCKS[0], folder / "zzz.safetensors")
    flip_byte(folder / "zzz.safetensors", -3000)
    (folder / f".{BLOCKS[3]}.partial").write_bytes(b"half")
    (folder.parent / "0123456789ab").mkdir()
    quantized(chosen, SELF)
    assert bytes_of(chosen) == bytes_of(Build(done))
    assert [path.name for path in folder.parent.iterdir()] == ["tokens.json"]


def test_shards_that_are_done_and_choices_are_both_kept(
    build: Build, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = quantize._leave_facts
    written: list[str] = []

    def fail_at_the_second(target: Path, *rest: Any) -> Any:
        if written:
            raise StoppedHere
        written.append(target.name)
        return original(target, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(quantize, "_leave_facts", fail_at_the_second)
        with pytest.raises(StoppedHere):
            run_stage(build, "quantize", SELF, CPU, SILENT)
    (folder,) = (path for path in build.calibration.iterdir() if path.is_dir())
    before = age(folder)
    shard = build.quantized / written[0]
    inode = shard.stat().st_ino
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Calibrator, "clear", lambda _: None)
        quantized(build, SELF)
    assert times(folder) == before
    assert shard.stat().st_ino == inode
    assert bytes_of(build) == bytes_of(Build(done))


def test_choices_of_another_kind_of_device_do_not_mix(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was written from them is written again, though the stage's key is the same."""
    run_stage(build, "quantize", SELF, CPU, SILENT)
    inodes = {path.name: path.stat().st_ino for path in build.quantized.glob("*.safetensors")}
    build.forget(QUANTIZE)
    original = Calibrator.choose

    def elsewhere(*args: Any, **options: Any) -> Any:
        return replace(original(*args, **options), identity="of another device")

    monkeypatch.setattr(Calibrator, "choose", elsewhere)
    run_stage(build, "quantize", SELF, CPU, SILENT)
    for name, inode in inodes.items():
        assert (build.quantized / name).stat().st_ino != inode


def test_tokens_are_kept(chosen: Build) -> None:
    path = chosen.calibration / TOKENS_FILE
    before = path.stat().st_mtime_ns, path.read_bytes()
    quantized(chosen, SELF)
    quantized(chosen, NEAREST)
    quantized(chosen, SELF)
    quantized(chosen, settings(skip_modules=("h.0",)))
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before


@pytest.mark.parametrize("damage", ["torn", "foreign", "gone"])
def test_tokens_that_are_not_ours_are_made_again(done: Path, tmp_path: Path, damage: str) -> None:
    build = Build(copy_of(done, tmp_path / "build"))
    before = bytes_of(build)
    path = build.calibration / TOKENS_FILE
    kept = path.read_bytes()
    if damage == "torn":
        path.write_bytes(kept[: len(kept) // 2])
    elif damage == "foreign":
        path.write_text(json.dumps({**json.loads(kept), "key": "of another source"}))
    else:
        path.unlink()
    assert states(build, SELF, CPU)["quantize"].status == "stale"
    assert quantized(build, SELF).ran
    assert path.read_bytes() == kept
    assert bytes_of(build) == before


def test_tokens_that_changed_are_another_calibration(done: Path, tmp_path: Path) -> None:
    build = Build(copy_of(done, tmp_path / "build"))
    before = bytes_of(build)
    path = build.calibration / TOKENS_FILE
    value = json.loads(path.read_bytes())
    value["ids"][0][5] = (value["ids"][0][5] + 1) % 256
    path.write_text(json.dumps(value))
    build.forget(SERIALIZE)
    with pytest.raises(BuildError, match="stale"):
        run_stage(build, "serialize", SELF, CPU, SILENT)
    assert quantized(build, SELF).ran
    sha = manifest_of(build)["calibration"]["tokens_sha256"]
    assert sha not in before["manifest.json"].decode()
    assert json.loads((build.export / "calibration.json").read_text())["ids"] == value["ids"]


def test_later_stages_want_the_same_recipe(done: Path, tmp_path: Path) -> None:
    build = Build(copy_of(done, tmp_path / "build"))
    with pytest.raises(BuildError, match="stale"):
        run_stage(build, "serialize", NEAREST, CPU, SILENT)
    assert not run_stage(build, "serialize", SELF, CPU, SILENT).ran


def test_what_makes_it_stale(done: Path, tmp_path: Path) -> None:
    build = Build(copy_of(done, tmp_path / "build"))
    text = write_text(tmp_path)

    def status(options: Recipe) -> str:
        return states(build, options, CPU)["quantize"].status

    assert status(SELF) == "done"
    for other in (
        NEAREST,
        settings(tokens=2048),
        settings(text),
        settings(skip_modules=("h.0",)),
    ):
        assert status(other) == "stale"
    verify = replace(SELF.verify, max_mean_kl=9.0)
    assert status(replace(SELF, verify=verify)) == "done"

    quantized(build, settings(text))
    assert status(settings(text)) == "done"
    assert status(settings(write_text(tmp_path, "moved.txt"))) == "done"  # where it lies is nothing
    assert status(settings(write_text(tmp_path, "other.txt", shift=1))) == "stale"
    manifest = manifest_of(build)
    assert manifest["recipe"]["quantize"]["calibrate"] == "text"
    assert manifest["calibration"]["source"] == "text"
    assert str(tmp_path) not in json.dumps(manifest)


def test_there_and_back(build: Build, done: Path) -> None:
    quantized(build, NEAREST)
    plain = bytes_of(build)
    manifest = manifest_of(build)
    assert manifest["recipe"]["quantize"] == {"skip_modules": [], "rounding": "nearest"}
    assert "calibration" not in manifest
    assert not build.calibration.exists()
    assert quantized(build, SELF).ran
    assert bytes_of(build) == bytes_of(Build(done))
    assert quantized(build, NEAREST).ran
    assert bytes_of(build) == plain
    assert not (build.export / "calibration.json").exists()
    assert quantized(build, SELF).ran
    assert bytes_of(build) == bytes_of(Build(done))


def test_what_the_manifest_says(done: Path) -> None:
    build = Build(done)
    manifest = manifest_of(build)
    tokens = build.calibration / TOKENS_FILE
    kept = json.loads(tokens.read_bytes())
    assert manifest["recipe"]["quantize"] == {
        "skip_modules": [],
        "calibrate": "self",
        "calibration_tokens": 1024,
        "extra_bytes": "",
        "rounding": "calibrated",
    }
    calibration = manifest["calibration"]
    assert calibration.pop("tokens_sha256")
    assert calibration == {
        "source": "self",
        "sequences": 16,
        "tokens": 1024,
        "device": "cpu",
        "fallbacks": {},
        "kept": [],
        "extra_bytes": 0,
    }
    published = json.loads((build.export / "calibration.json").read_text())
    assert published["ids"] == kept["ids"]
    assert "calibration.json" in manifest["files"]
    facts = build.need(QUANTIZE).facts.to_json()["calibration"]
    assert facts["seconds"]["whole"] > 0


def test_a_recipe_for_nearest_has_no_new_keys() -> None:
    assert Recipe().as_json()["quantize"] == {"skip_modules": [], "rounding": "nearest"}
    assert QuantizeRecipe(calibration_tokens=999).shaping() == QuantizeRecipe().shaping()


def test_more_tokens_than_one_batch_and_an_odd_number(build: Build) -> None:
    quantized(build, settings(tokens=2048 + 300))
    calibration = manifest_of(build)["calibration"]
    assert (calibration["sequences"], calibration["tokens"]) == (36, 2304)
