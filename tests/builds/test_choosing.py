"""A name -> one of a listing: what each kind of name means, and that nothing is guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nf4_pipeline.build_folder.spec import BuildSpec, SourcePin
from nf4_pipeline.build_folder.variant import folder_name
from nf4_pipeline.builds import Listed, no_build
from nf4_pipeline.builds.choosing import choose, matching
from nf4_pipeline.builds.finishing import how_to_finish
from nf4_pipeline.errors import UsageError
from nf4_pipeline.recipe import QuantizeRecipe, Recipe, SerializeRecipe

DEFAULT = Recipe()
CALIBRATED = Recipe(QuantizeRecipe(calibrate="self"))
MORE = Recipe(QuantizeRecipe(calibrate="self", extra_bytes="5%"))
CUT = Recipe(serialize=SerializeRecipe("5MB"))

ALL = ("download", "quantize", "serialize", "verify", "attest")


def listed(
    repo: str, recipe: Recipe | None, commit: str = "a" * 40, stages: int = 5, **more: Any
) -> Listed:
    """A build as a listing would show it, in the folder that it would have."""
    pin = SourcePin(repo=repo, commit=commit, sha256=None)
    tables = {} if recipe is None else {t: recipe.table(t) for t in ("quantize", "serialize")}
    spec = BuildSpec(source=pin, recipe=tables)
    root = Path("artifacts") / folder_name(pin.slug, spec.variant().tag)
    return Listed(root, spec, done=ALL[:stages], **more)


PLAIN = listed("org/one", DEFAULT)
BETTER = listed("org/one", CALIBRATED)
BEST = listed("org/one", MORE)
LATER = listed("org/one", DEFAULT, commit="b" * 40)
SAMPLE = listed("nf4-pipeline/sample", CUT, is_sample=True)
LOCAL = listed("mine", DEFAULT, source=Path("/models/mine"))
FETCHED = listed("org/one", None, commit="c" * 40, stages=1)
LISTING = [PLAIN, BETTER, BEST, SAMPLE, LOCAL]

NAMES: dict[str, tuple[str, list[Listed]]] = {
    "a model": ("org/one", [PLAIN, BETTER, BEST]),
    "the sample": ("sample", [SAMPLE]),
    "the sample's repo is no name of its own": ("nf4-pipeline/sample", []),
    "a folder of the default": (PLAIN.root.name, [PLAIN]),
    "a folder of another": (BETTER.root.name, [BETTER]),
    "a tag": (BETTER.tag, [BETTER]),
    "a tag without its hash": ("calibrated", [BETTER]),
    "the beginning of a tag": ("calibrated-ex", []),
    "the first words of a tag": ("calibrated-extra", [BEST]),
    "the default": ("default", [PLAIN, LOCAL]),
    "a part of a model": ("one", []),
    "a part of a folder": ("org--one", []),
    "nothing": ("", []),
    "another model": ("org/two", []),
    "case counts": ("Calibrated", []),
}


@pytest.mark.parametrize("case", NAMES)
def test_what_a_name_means(case: str) -> None:
    name, expected = NAMES[case]
    assert matching(name, LISTING) == expected


def test_a_local_folder_means_the_builds_of_it() -> None:
    assert matching("whatever", LISTING, Path("/models/mine")) == [LOCAL]
    assert matching("org/one", LISTING, Path("/models/else")) == []


def test_a_short_tag_means_a_longer_one_only_where_nothing_is_called_so() -> None:
    assert matching("calibrated", [BEST, SAMPLE]) == [BEST]
    assert matching("calibrated", [BEST, BETTER]) == [BETTER]


def test_one_that_fits_is_taken_and_said() -> None:
    chosen = choose("org/one", [BETTER], newest=False)
    assert chosen.listed is BETTER
    assert not chosen.named
    assert str(BETTER.root) in chosen.note
    assert choose(BETTER.tag, [BETTER], newest=False).named
    assert choose("calibrated", [BEST], newest=False).named


@pytest.mark.parametrize("name", ["org/one", "default", None])
@pytest.mark.parametrize("fit", [[PLAIN, BETTER], [BETTER, LATER, PLAIN], [PLAIN, LATER]])
def test_several_are_listed_and_none_is_guessed(name: str | None, fit: list[Listed]) -> None:
    with pytest.raises(UsageError) as raised:
        choose(name, fit, newest=False)
    text = str(raised.value)
    for build in fit:
        assert build.root.name in text
    assert f"{len(fit)} builds" in text
    offered = text.rpartition("its folder: ")[2].rstrip(".").split(", ")
    assert len(offered) == len(fit)
    for short, build in zip(offered, fit, strict=True):
        assert matching(short, fit) == [build]  # what is offered settles it
    chosen = choose(name, fit, newest=True)
    assert chosen.listed is fit[0]
    assert "worked on last" in chosen.note


def test_those_that_lack_what_is_needed_count_only_where_all_do() -> None:
    half = listed("org/one", CALIBRATED, stages=2)
    assert choose("org/one", [half, PLAIN], newest=False, needs="serialize").listed is PLAIN
    assert choose("org/one", [half], newest=False, needs="serialize").listed is half
    # A killed build has a recipe, and push takes no other in its place; a download has none.
    with pytest.raises(UsageError):
        choose("org/one", [half, PLAIN], newest=False, needs="recipe")
    assert choose("org/one", [FETCHED, PLAIN], newest=False, needs="recipe").listed is PLAIN


NOBODY: dict[str, tuple[str, str]] = {
    "an artifact on the Hub": (
        "me/sample-nf4",
        "me/sample-nf4 was not built here. If it is an artifact on the Hub, check it",
    ),
    "and what then": (
        "me/sample-nf4",
        "download me/sample-nf4 --local-dir sample-nf4; then: nf4 reproduce sample-nf4. If",
    ),
    "at a revision": (
        "me/sample-nf4@v2",
        "hf download me/sample-nf4 --revision v2 --local-dir sample-nf4; then: ",
    ),
    "an id that is near": ("org/onr", "Did you mean 'org/one'? If it is an artifact"),
    "an id that ends alike": ("me/one", "me/one was not built here. If it is"),
    "a tag that is near": ("defualt", "no Hub id (ORG/NAME) is called 'defualt'; looked in {}."),
    "and which": ("defualt", "Did you mean 'default'? To make a build: nf4 build MODEL"),
    "sampel": ("sampel", "Did you mean 'sample'?"),
    "a folder that is near": ("modle", "Did you mean 'model'?"),
    "a path": ("builds/onee", "builds/onee: no such folder. Did you mean 'builds/one'?"),
    "the sample": ("sample", "There is no build of sample under {}. Start one: nf4 build sample"),
    "a checkpoint": ("model", "Start one: nf4 build model"),
    "an artifact": ("loaded", "loaded was not built on this machine, and this needs a build."),
}


@pytest.mark.parametrize("case", NOBODY)
def test_what_is_said_of_a_name_that_nothing_has(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model", "builds/one", "loaded"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "loaded" / "manifest.json").write_text("{}")
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    name, said = NOBODY[case]
    listing = [PLAIN, BETTER] if name == "sample" else LISTING
    text = str(no_build(name, Path("artifacts"), listing))
    assert said.format(tmp_path / "artifacts") in text


def test_what_is_said_where_there_is_none_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (None, "calibrated"):
        assert f"{tmp_path}/artifacts" in str(no_build(name))
    (tmp_path / "one@000000000000" / "records").mkdir(parents=True)
    for name in (None, "calibrated", "org/one"):
        assert f"The builds lie in {tmp_path} itself" in str(no_build(name))


def local(folder: Path) -> Listed:
    """A build of a local folder."""
    pin = SourcePin(repo="mine", commit=None, sha256="c" * 64, folder=str(folder))
    return Listed(Path("builds/mine"), BuildSpec(source=pin, recipe={}), source=folder)


@pytest.mark.parametrize(
    ("build", "command"),
    [
        (PLAIN, f"nf4 build org/one --revision {'a' * 40} --build-dir {PLAIN.root}"),
        (SAMPLE, f"nf4 build sample --build-dir {SAMPLE.root} --max-shard-size 5MB"),
        (BETTER, f"--build-dir {BETTER.root} --calibrate self"),
        (local(Path("/gone")), "nf4 build MODEL --build-dir builds/mine"),
        (local(Path("/tmp")), "nf4 build /tmp --build-dir builds/mine"),
        (Listed(Path("odd name"), None), "nf4 build MODEL --build-dir 'odd name'"),
    ],
)
def test_how_a_build_is_finished(build: Listed, command: str) -> None:
    assert command in how_to_finish(build)
