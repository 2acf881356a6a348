"""Recipes of one model side by side, in any order; and no build becomes another one unasked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.build_folder.spec import SPEC_FILE, read_spec
from nf4_pipeline.builds import find_build, find_builds, find_other, find_place, list_builds
from nf4_pipeline.builds.placing import begin_beside
from nf4_pipeline.errors import BuildError, PipelineError
from nf4_pipeline.job import run_stage, states
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import PartialRecipe, QuantizeRecipe, Recipe, SerializeRecipe
from nf4_pipeline.records import Reading

from tests.support.folder_state import Content, content
from tests.support.jobs import CPU, download
from tests.support.tiny import copy_of, flip_byte, write_falcon

pytestmark = pytest.mark.usefixtures("workers_here")

DEFAULT = Recipe()
SKIP = Recipe(QuantizeRecipe(("h.0",)))
CUT = Recipe(serialize=SerializeRecipe("30KB"))
BOTH = Recipe(QuantizeRecipe(("h.0",)), SerializeRecipe("30KB"))
TEXT = "A fox sat by the river and looked at the moon for a long time. " * 8


def make(model: Path, artifacts: Path, recipe: Recipe) -> Build:
    """Downloads, quantizes and serializes, as `nf4 build` does before it verifies."""
    build, *_ = download(model, artifacts, recipe=recipe)
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, recipe, CPU, SILENT)
    return build


def said(recipe: Recipe, *tables: str) -> PartialRecipe:
    return PartialRecipe(recipe, frozenset(tables))


ORDERS = [
    [DEFAULT, SKIP, CUT, BOTH],
    [BOTH, CUT, SKIP, DEFAULT],
    [CUT, DEFAULT, BOTH, SKIP],
]


@pytest.mark.parametrize("order", ORDERS)
def test_recipes_in_any_order_stand_side_by_side(
    tiny_falcon: Path, tmp_path: Path, order: list[Recipe]
) -> None:
    made: list[tuple[Build, Content]] = []
    for recipe in order:
        build = make(tiny_falcon, tmp_path, recipe)
        for earlier, files in made:
            assert content(earlier) == files
        made.append((build, content(build)))
    assert len({build.root for build, _ in made}) == len(order)
    assert len(list_builds(tmp_path)) == len(order)
    for (build, files), recipe in zip(made, order, strict=True):
        again, _, ran = download(tiny_falcon, tmp_path, recipe=recipe)
        assert (again.root, ran) == (build.root, False)
        manifest = json.loads((build.export / "manifest.json").read_text())
        assert manifest["recipe"] == {
            name: recipe.as_json()[name] for name in ("quantize", "serialize")
        }
        assert content(build) == files


OTHERS: dict[str, tuple[Recipe, str]] = {
    "quantize": (SKIP, "quantize.skip_modules is not set, and ['h.0'] was asked for"),
    "serialize": (CUT, "serialize.max_shard_size is 1GB, and 30KB was asked for"),
    "both": (BOTH, "; serialize.max_shard_size is 1GB"),
}


@pytest.fixture
def standing(exported_falcon: Path, tmp_path: Path) -> Build:
    """A build of the default recipe in a folder that the user named."""
    return Build(copy_of(exported_falcon, tmp_path / "standing"))


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("old", [False, True])
def test_a_folder_becomes_no_other_recipe_unless_asked(
    tiny_falcon: Path, standing: Build, case: str, old: bool
) -> None:
    recipe, message = OTHERS[case]
    if old:  # an earlier version wrote no such file
        (standing.root / SPEC_FILE).unlink()
    before = content(standing)
    doors: list[Callable[[], object]] = [
        lambda: download(tiny_falcon, standing.root, build_dir=standing.root, recipe=recipe)
    ]
    if recipe.quantize != DEFAULT.quantize:
        doors.append(lambda: run_stage(standing, "quantize", recipe, CPU, SILENT))
    if recipe.serialize != DEFAULT.serialize:
        doors.append(lambda: run_stage(standing, "serialize", recipe, CPU, SILENT))
    for door in doors:
        with pytest.raises(BuildError, match="is another build: ") as raised:
            door()
        assert "--replace" in str(raised.value)
        assert "Leave --build-dir out, or name another one" in str(raised.value)
        assert content(standing) == before
    with pytest.raises(BuildError) as raised:
        doors[0]()
    assert message in str(raised.value)
    assert str(standing.root) in str(raised.value)

    for stage in ("quantize", "serialize"):
        run_stage(standing, stage, recipe, CPU, SILENT, replaces=True)
    manifest = json.loads((standing.export / "manifest.json").read_text())
    assert manifest["recipe"]["quantize"] == recipe.as_json()["quantize"]
    with pytest.raises(BuildError, match="is another build"):  # and now the other way round
        run_stage(
            standing, "quantize" if case != "serialize" else "serialize", DEFAULT, CPU, SILENT
        )


def test_a_folder_becomes_no_build_of_another_source(standing: Build, tmp_path: Path) -> None:
    other = write_falcon(tmp_path / "tiny-falcon", seed=1)
    renamed = copy_of(other, tmp_path / "renamed")
    before = content(standing)
    for model in (other, renamed):
        with pytest.raises(
            BuildError, match=r"its source is tiny-falcon at content [0-9a-f]{12}, "
        ):
            download(model, tmp_path, build_dir=standing.root)
        assert content(standing) == before
    download(other, tmp_path, build_dir=standing.root, replaces=True)
    assert states(standing, said(DEFAULT), CPU)["quantize"].status == "stale"
    run_stage(standing, "quantize", DEFAULT, CPU, SILENT)
    assert content(standing) != before


def test_a_build_that_was_killed_before_its_first_record_keeps_its_folder(
    tiny_falcon: Path, downloaded_falcon: Path, tmp_path: Path
) -> None:
    """What is noted first holds, though no record says so yet."""
    build = Build(copy_of(downloaded_falcon, tmp_path / "build"))
    (build.root / "records" / "download.json").unlink()
    request = {"build_dir": build.root, "recipe": SKIP}
    download(tiny_falcon, tmp_path, **request)
    (build.root / "records" / "download.json").unlink()
    with pytest.raises(BuildError, match=r"skip_modules is \['h.0'\], and not set was asked for"):
        download(tiny_falcon, tmp_path, build_dir=build.root, recipe=DEFAULT)
    download(tiny_falcon, tmp_path, **request)


def test_a_folder_that_was_only_downloaded_takes_any_recipe(
    tiny_falcon: Path, tmp_path: Path
) -> None:
    build, *_ = download(tiny_falcon, tmp_path, build_dir=tmp_path / "mine")
    run_stage(build, "quantize", SKIP, CPU, SILENT)
    with pytest.raises(BuildError, match="is another build"):
        run_stage(build, "quantize", DEFAULT, CPU, SILENT)
    # Nothing said is what it is for.
    assert not run_stage(build, "quantize", said(DEFAULT), CPU, SILENT).ran
    assert run_stage(build, "serialize", said(DEFAULT), CPU, SILENT).ran


def test_a_build_of_an_earlier_version_goes_on_in_its_folder(
    tiny_falcon: Path, tmp_path: Path
) -> None:
    """It holds another recipe than the name says now; the default gets a folder of its own."""
    default, *_ = download(tiny_falcon, tmp_path)
    for stage in ("quantize", "serialize"):
        run_stage(default, stage, SKIP, CPU, SILENT)
    (default.root / SPEC_FILE).unlink()
    files = content(default)
    assert make(tiny_falcon, tmp_path, SKIP).root == default.root
    new = make(tiny_falcon, tmp_path, DEFAULT)
    assert new.root.name.startswith(f"{default.root.name}-default-")
    assert content(default) == files
    assert make(tiny_falcon, tmp_path, DEFAULT).root == new.root
    assert {b.root for b in find_builds("skip", tmp_path)} == {default.root}


def test_texts_to_calibrate_on_are_told_apart_by_what_they_hold(
    tiny_falcon: Path, tmp_path: Path
) -> None:
    def recipe(name: str, text: str) -> Recipe:
        (tmp_path / name).write_text(text)
        return Recipe(QuantizeRecipe(calibrate=str(tmp_path / name), calibration_tokens=256))

    artifacts = tmp_path / "artifacts"
    one, *_ = download(tiny_falcon, artifacts, recipe=recipe("one.txt", TEXT))
    moved, *_ = download(tiny_falcon, artifacts, recipe=recipe("moved.txt", TEXT), check=True)
    two, *_ = download(tiny_falcon, artifacts, recipe=recipe("two.txt", TEXT + "More."))
    assert one.root == moved.root != two.root
    spec = read_spec(one.root)
    assert spec is not None
    assert spec.recipe["quantize"]["calibrate"] == str(tmp_path / "moved.txt")
    edited = recipe("moved.txt", TEXT + "Even more.")
    with pytest.raises(BuildError, match=r"quantize\.calibrate is text [0-9a-f]{12}"):
        download(tiny_falcon, artifacts, build_dir=one.root, recipe=edited)


def test_a_prefix_that_is_stripped_is_part_of_it(tiny_falcon: Path, tmp_path: Path) -> None:
    reading = Reading(allow_unused=("score",))
    build, *_ = download(tiny_falcon, tmp_path, reading=reading)
    assert "-unused-" in build.root.name
    recipe = reading.into(Recipe())
    assert download(tiny_falcon, tmp_path, reading=reading, recipe=recipe).build.root == build.root
    assert download(tiny_falcon, tmp_path).build.root != build.root


class TestAStageAlone:
    """By a model's name it works in the build of its recipe, begun with what lies beside it."""

    @pytest.fixture
    def artifacts(self, tiny_falcon: Path, tmp_path: Path) -> Path:
        download(tiny_falcon, tmp_path / "artifacts")
        return tmp_path / "artifacts"

    def test_quantize_then_serialize(self, tiny_falcon: Path, artifacts: Path) -> None:
        (downloaded,) = list_builds(artifacts)
        place, note = find_place(tiny_falcon, "quantize", said(SKIP, "quantize"), artifacts)
        assert place.root.name.startswith(f"{downloaded.root.name}-skip-")
        assert "beside" in note
        assert run_stage(place, "quantize", said(SKIP, "quantize"), CPU, SILENT).ran
        # The default is begun in the folder that was downloaded.
        plain, _ = find_place(tiny_falcon, "quantize", said(DEFAULT), artifacts)
        assert plain.root == downloaded.root
        run_stage(plain, "quantize", said(DEFAULT), CPU, SILENT)
        with pytest.raises(PipelineError, match="can mean 2 builds"):
            find_place(tiny_falcon, "serialize", said(DEFAULT), artifacts)
        cut, _ = find_place("skip", "serialize", said(DEFAULT), artifacts)
        assert cut.root == place.root

        before = content(place)
        smaller = said(CUT, "serialize")
        assert run_stage(place, "serialize", SKIP, CPU, SILENT).ran
        with pytest.raises(BuildError, match="max_shard_size"):
            run_stage(place, "serialize", smaller, CPU, SILENT)
        assert content(place).items() >= before.items()

    def test_other_shards_of_what_is_quantized(self, tiny_falcon: Path, artifacts: Path) -> None:
        build = make(tiny_falcon, artifacts, SKIP)
        before = content(build)
        smaller = said(CUT, "serialize")
        place, _ = find_place(tiny_falcon, "serialize", smaller, artifacts)
        assert "-skip-shards-" in place.root.name
        run_stage(place, "serialize", smaller, CPU, SILENT)
        assert content(build) == before
        for name in [name for name in before if name.startswith("quantized/")]:
            assert (place.root / name).samefile(build.root / name)
        assert content(make(tiny_falcon, artifacts, BOTH)) == content(place)
        assert states(place, said(DEFAULT), CPU)["serialize"].status == "done"

    def test_what_is_begun_beside_does_not_hang_on_the_other(
        self, tiny_falcon: Path, artifacts: Path
    ) -> None:
        """A file of the source that changed is seen; a kill on the way does no harm."""
        (listed,) = list_builds(artifacts)
        origin, root = Build(listed.root), listed.root.with_name("begun")
        for _ in range(2):
            begin_beside(origin, root, SKIP, ["download"])
            (root / "records" / "download.json").unlink()
        build = begin_beside(origin, root, SKIP, ["download"])
        link = build.source / "config.json"
        original = link.read_bytes()
        target = link.resolve()
        link.unlink()
        link.with_name("copy").write_bytes(original)
        link.symlink_to(link.with_name("copy"))
        flip_byte(link.with_name("copy"))
        assert target.read_bytes() == original
        with pytest.raises(PipelineError, match=r"config\.json"):
            run_stage(build, "quantize", SKIP, CPU, SILENT)


def test_the_other_build_is_found_by_its_tag(tiny_falcon: Path, tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    plain, skip = (make(tiny_falcon, artifacts, recipe) for recipe in (DEFAULT, SKIP))
    second = write_falcon(tmp_path / "second", seed=2)
    foreign = make(second, artifacts, SKIP)
    found = find_other("skip", plain, artifacts)
    assert found is not None
    assert found.folder == skip.export
    found = find_other("default", skip, artifacts)
    assert found is not None
    assert found.folder == plain.export
    found = find_other(tiny_falcon, skip, artifacts)
    assert found is not None
    assert found.folder == plain.export
    found = find_other(foreign.root, plain, artifacts)
    assert found is not None
    assert found.folder == foreign.export
    with pytest.raises(PipelineError, match="skip can mean 2 builds"):
        find_build("skip", artifacts)
    assert find_build(second, artifacts).listed.root == foreign.root


def test_a_spec_that_cannot_be_read_counts_as_none(standing: Build) -> None:
    before = content(standing)
    for text in ("", "{", "[]", '{"version": 9}', '{"version": 1, "source": {}, "recipe": {}}'):
        (standing.root / SPEC_FILE).write_text(text)
        with pytest.raises(BuildError, match="is another build"):
            run_stage(standing, "quantize", SKIP, CPU, SILENT)
        assert not run_stage(
            standing, "quantize", said(DEFAULT), replace(CPU, workers=1), SILENT
        ).ran
    assert content(standing) == before
