"""Parts of quantize: in one folder or many, by one process or several, in any order."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.engine.parts import Part
from nf4_pipeline.errors import BuildError, UsageError
from nf4_pipeline.job import merge_parts, run_part, run_stage, states
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import PartialRecipe, QuantizeRecipe, Recipe
from nf4_pipeline.records import QUANTIZE, part_kind, part_records
from safetensors.torch import load_file, save_file

from tests.support.jobs import CPU, download
from tests.support.tiny import copy_of, flip_byte, nf4, start_nf4, write_falcon

pytestmark = pytest.mark.usefixtures("workers_here")

DEFAULT: Final = PartialRecipe(Recipe(), frozenset())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Falcon in nine files, of which two hold nothing but norms and the tied head."""
    return write_falcon(tmp_path_factory.mktemp("parts") / "falcon", layers=4, shards=9)


@pytest.fixture(scope="module")
def downloaded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of it in which download is done."""
    build, *_ = download(source, tmp_path_factory.mktemp("downloaded"))
    return build.root


@pytest.fixture(scope="module")
def whole(downloaded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name in quantized/ -> sha256, as one process makes it."""
    build = Build(copy_of(downloaded, tmp_path_factory.mktemp("whole") / "build"))
    quantize(build)
    return hashes(build)


@pytest.fixture
def build(downloaded: Path, tmp_path: Path) -> Build:
    return Build(copy_of(downloaded, tmp_path / "build"))


def hashes(build: Build) -> dict[str, str]:
    return {name: digest.sha256 for name, digest in build.need(QUANTIZE).outputs.items()}


def make(build: Build, number: int, of: int, recipe: PartialRecipe = DEFAULT) -> None:
    run_part(build, Part(of, number), recipe, CPU, SILENT)


def quantize(build: Build) -> None:
    run_stage(build, "quantize", Recipe(), CPU, SILENT)


def merge(build: Build) -> None:
    merge_parts(build, DEFAULT, CPU, SILENT)


@pytest.mark.parametrize("of", [1, 3, 8, 20])
def test_parts_in_any_order_make_the_same_bytes(
    of: int, build: Build, whole: dict[str, str]
) -> None:
    assert len(whole) == 7
    numbers = list(range(1, of + 1))
    random.Random(of).shuffle(numbers)
    for number in numbers:
        assert build.record(QUANTIZE) is None
        make(build, number, of)
    assert f"{of} of {of} parts are done" in states(build, DEFAULT, CPU)["quantize"].why
    merge(build)
    assert hashes(build) == whole
    assert not part_records(build)


def test_in_folders_of_their_own_brought_together(
    downloaded: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    """As machines without a common disk do it: only what docs say is copied."""
    target = Build(copy_of(downloaded, tmp_path / "target"))
    for number in (3, 1, 2):
        one = Build(copy_of(downloaded, tmp_path / f"machine-{number}"))
        make(one, number, 3)
        for folder in ("quantized", "records"):
            (target.root / folder).mkdir(exist_ok=True)
            for path in (one.root / folder).iterdir():
                if folder == "quantized" or path.name.startswith("quantize."):
                    shutil.copyfile(path, target.root / folder / path.name)
        shutil.rmtree(one.root)
    merge(target)
    assert hashes(target) == whole


def test_serialize_and_build_complete_it_themselves(
    downloaded: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    for stage in ("serialize", "quantize"):
        build = Build(copy_of(downloaded, tmp_path / stage))
        for number in (2, 1):
            make(build, number, 2)
        before = {path.name: path.stat().st_ino for path in build.quantized.iterdir()}
        run_stage(build, stage, Recipe(), CPU, SILENT)
        assert hashes(build) == whole
        assert before == {path.name: path.stat().st_ino for path in build.quantized.iterdir()}


def test_processes_side_by_side_in_one_folder(
    build: Build, whole: dict[str, str], tmp_path: Path
) -> None:
    """One of them twice: it waits for nobody and says so, or finds the work done."""
    parts = ["1/3", "2/3", "3/3", "2/3"]
    running = [
        start_nf4("quantize", "--build-dir", build.root, "--part", part, cwd=tmp_path)
        for part in parts
    ]
    ended = [(process.communicate(timeout=300), process.returncode) for process in running]
    assert [ended[0][1], ended[2][1]] == [0, 0]
    for (_, err), status in (ended[1], ended[3]):
        assert status == 0 or "is in use by another nf4 process" in err
    assert 0 in (ended[1][1], ended[3][1])
    done = nf4("quantize", "--build-dir", build.root, "--merge", "--json", cwd=tmp_path)
    assert done.status == 0, done.err
    assert hashes(build) == whole


def test_nothing_else_runs_beside_a_part(build: Build) -> None:
    with build.shared():
        with pytest.raises(BuildError, match="in use by another nf4 process"), build.locked():
            pass
        with build.shared():
            pass
    with build.locked(), pytest.raises(BuildError, match="in use"), build.shared():
        pass


def missing_part(build: Build) -> None:
    build.forget(part_kind(Part(3, 2)))


def missing_file(build: Build) -> None:
    (build.root / min(part_records(build)[Part(3, 2)].outputs)).unlink()


def missing_facts(build: Build) -> None:
    (build.root / max(part_records(build)[Part(3, 2)].outputs)).unlink()


def flipped_bit(build: Build) -> None:
    flip_byte(build.root / min(part_records(build)[Part(3, 2)].outputs))


def of_another_recipe(build: Build) -> None:
    recipe = PartialRecipe(
        Recipe(quantize=QuantizeRecipe(skip_modules=("h.0",))), frozenset({"quantize"})
    )
    other = Build(copy_of(build.root, build.root.with_name("other")))
    (other.root / "build.json").unlink()
    make(other, 2, 3, recipe)
    shutil.copytree(other.quantized, build.quantized, dirs_exist_ok=True)
    shutil.copyfile(
        other.root / "records/quantize.2-of-3.json", build.root / "records/quantize.2-of-3.json"
    )


def no_part(build: Build) -> None:
    for number in (1, 2, 3):
        build.forget(part_kind(Part(3, number)))


DAMAGE: Final[dict[Callable[[Build], None], str]] = {
    missing_part: r"holds 2 of 3 parts; 2/3 are missing\. Run `nf4 quantize --part 2/3`",
    missing_file: r"made by part 2/3, is not there as that part left it.*--part 2/3` again",
    missing_facts: r"made by part 2/3, is not there as that part left it.*--part 2/3` again",
    flipped_bit: r"made by part 2/3, is not there as that part left it.*--part 2/3` again",
    of_another_recipe: r"2/3 are missing \(2/3 there is of another source or recipe\)",
    no_part: r"has no parts to merge: --part made none.*nf4 quantize \S+ --part 1/3",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_merge_refuses_and_its_remedy_helps(
    damage: Callable[[Build], None], build: Build, whole: dict[str, str]
) -> None:
    for number in (1, 2, 3):
        make(build, number, 3)
    damage(build)
    with pytest.raises(BuildError, match=DAMAGE[damage]):
        merge(build)
    assert build.record(QUANTIZE) is None
    for number in (1, 2, 3) if damage is no_part else (2,):
        make(build, number, 3)
    merge(build)
    assert hashes(build) == whole


def test_tied_weights_that_differ(source: Path, tmp_path: Path) -> None:
    """All parts find it out, whichever of them copies the tensor."""
    model = copy_of(source, tmp_path / "model")
    file = next(path for path in model.glob("*.safetensors") if "lm_head.weight" in load_file(path))
    tensors = load_file(file)
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, file, {"format": "pt"})
    at_once, *_ = download(model, tmp_path / "whole")
    quantize(at_once)
    assert at_once.need(QUANTIZE).facts.untied == ("lm_head.weight",)
    finishes: tuple[Callable[[Build], None], ...] = (merge, quantize)
    for number, finish in enumerate(finishes):
        build, *_ = download(model, tmp_path / f"parts-{number}")
        for part in (5, 2, 4, 1, 3):
            make(build, part, 5)
        before = {path.name: path.stat().st_ino for path in build.quantized.iterdir()}
        finish(build)
        assert before == {path.name: path.stat().st_ino for path in build.quantized.iterdir()}
        assert hashes(build) == hashes(at_once)


def test_calibrated_codes_cannot_be_divided(build: Build) -> None:
    recipe = PartialRecipe(
        Recipe(quantize=QuantizeRecipe(calibrate="self")), frozenset({"quantize"})
    )
    with pytest.raises(UsageError, match="cannot be divided"):
        make(build, 1, 2, recipe)
