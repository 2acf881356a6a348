"""Every command takes a model, a tag, a folder's name or a path, and says which build it took."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.job import run_stage
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import QuantizeRecipe, Recipe

from tests.support.command_line import run_nf4, without_progress
from tests.support.folder_state import content
from tests.support.jobs import CPU, download
from tests.support.tiny import Done

pytestmark = pytest.mark.usefixtures("workers_here")

SKIP = Recipe(QuantizeRecipe(("h.0",)))


@dataclass(frozen=True)
class Two:
    """A model with two builds, the default one worked on last."""

    model: Path
    default: Build
    skip: Build


@pytest.fixture(scope="module")
def two(tiny_falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> Two:
    place = tmp_path_factory.mktemp("place")
    builds = []
    for recipe in (SKIP, Recipe()):
        build, *_ = download(tiny_falcon, place / "artifacts", recipe=recipe)
        for stage in ("quantize", "serialize"):
            run_stage(build, stage, recipe, CPU, SILENT)
        builds.append(build)
    return Two(tiny_falcon, builds[1], builds[0])


@pytest.fixture
def here(two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Two:
    """The same in the working folder; what a test changes there, it changes alone."""
    place = two.default.root.parents[1]
    shutil.copytree(place, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    names = [Path("artifacts") / build.root.name for build in (two.default, two.skip)]
    return Two(two.model, *map(Build, names))


# What each command says of a build that is not verified, and that it was this one.
COMMANDS: dict[str, tuple[list[str], int, str]] = {
    "quantize": ([], 0, "quantize: was done"),
    "serialize": ([], 0, "serialize: was done"),
    "verify": (["--prompts", "none.jsonl"], 2, "none.jsonl cannot be read"),
    "attest": ([], 1, "there is nothing to attest yet. Finish it: nf4 build "),
    "push": (["--dry-run", "--repo-id", "a/b"], 1, "only a verified build can be published"),
    "inspect": ([], 0, "FalconForCausalLM"),
    "prompt": (["Hello", "--max-new-tokens", "1", "--json"], 0, '"prompt": "Hello"'),
    "reproduce": ([], 2, "made from a local folder named 'tiny-falcon'"),
    "check": (["--key", "key.pem"], 1, "has no signature"),
    "sign": (["--key", "key.pem"], 2, "key.pem"),
    "status": ([], 0, "serialize  done"),
}
HARMLESS = {"inspect", "prompt"}
"""Of several builds of a model, these take the newest."""


def run(command: str, name: str | Path) -> Done:
    return run_nf4(command, name, *COMMANDS[command][0])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tag(here: Two, command: str) -> None:
    _, status, said = COMMANDS[command]
    done = run(command, "skip")
    assert done.status == status, done.err
    assert said in done.out + done.err
    assert f"{here.skip.root}" in done.out + done.err
    assert f"{here.default.root} " not in done.out + done.err
    if command != "status":
        assert f"build: {here.skip.root}\n" in done.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_with_two_builds(here: Two, command: str) -> None:
    before = content(here.default), content(here.skip)
    done = run(command, here.model)
    if command in HARMLESS:
        assert done.status == 0, done.err
        assert f"build: {here.default.root}, worked on last of 2 of {here.model}\n" in done.err
    elif command == "status":
        assert [line for line in done.out.splitlines() if line[0] != " "] == [
            str(here.default.root),
            str(here.skip.root),
        ]
        assert "  recipe     skip_modules = ['h.0']" in done.out.splitlines()
    elif command == "quantize":  # nothing said is the default recipe, as for `nf4 build`
        assert done.status == 0, done.err
        assert f"build: {here.default.root}" in done.err
    else:
        assert done.status == 2
        assert f"{here.model} can mean 2 builds: " in done.err
        assert done.err.rstrip().endswith(f"its folder: default, {tag_of(here.skip)}.")
    assert (content(here.default), content(here.skip)) == before


def tag_of(build: Build) -> str:
    return build.root.name.partition("@")[2][13:]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_path(here: Two, command: str) -> None:
    """Of a build, or of its export; nothing has to be said of it."""
    _, status, said = COMMANDS[command]
    for path in (here.skip.root, here.skip.export):
        done = run(command, path)
        assert done.status == status, done.err
        assert said in done.out + done.err
        assert "build: " not in done.err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "close"), [("skup", "skip"), ("skip-0000", "skip"), ("tiny-falcan", "tiny-falcon")]
)
def test_a_name_that_nothing_has(here: Two, command: str, name: str, close: str) -> None:
    before = content(here.default), content(here.skip)
    done = run(command, name)
    assert done.status in (1, 2)
    if command != "prompt":
        assert f"is called {name!r}" in done.err
        assert f"Did you mean {close!r}?" in done.err
    assert (content(here.default), content(here.skip)) == before


def test_without_a_name(here: Two) -> None:
    done = run_nf4("push", "--dry-run", "--repo-id", "a/b")
    assert done.status == 2
    assert "No build was named, and there are 2 builds" in done.err
    done = run_nf4("serialize")
    assert done.status == 0
    assert f"build: {here.default.root}" in done.err
    assert len(run_nf4("status", "--json").value) == 2
    shutil.rmtree(here.default.root)
    done = run_nf4("push", "--dry-run", "--repo-id", "a/b")
    assert f"build: {here.skip.root}\n" in done.err
    assert "only a verified build can be published" in done.err


def test_quiet_says_nothing_of_it(here: Two) -> None:
    done = run_nf4("serialize", "skip", "--quiet")
    assert (done.status, done.err) == (0, "")


def test_a_downloaded_artifact_and_a_source_without_a_build(here: Two, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(here.skip.export, tmp_path / "alone"))
    assert without_progress(run_nf4("inspect", alone).err) == ""
    assert "FalconForCausalLM" in run_nf4("inspect", alone).out
    shutil.rmtree("artifacts")
    done = run_nf4("inspect", here.model)
    assert done.status == 1
    assert (
        f"{here.model} is a checkpoint, not an artifact: a 16-bit model. Build it: nf4 build"
        in done.err
    )


def test_against_takes_a_tag(here: Two) -> None:
    done = run_nf4("verify", "skip", "--against", "default", "--prompts", "none.jsonl")
    assert done.status == 2
    assert f"against: {here.default.export}\n" in done.err
    done = run_nf4("verify", "skip", "--against", "defualt", "--prompts", "none.jsonl")
    assert done.status == 1
    assert "Did you mean 'default'?" in done.err


def test_stages_of_another_recipe_by_the_models_name(here: Two) -> None:
    before = content(here.default), content(here.skip)
    done = run_nf4("serialize", "skip", "--max-shard-size", "30KB")
    assert done.status == 1
    assert "is another build: serialize.max_shard_size is 1GB, and 30KB was asked for" in done.err
    shutil.rmtree(here.default.root)
    done = run_nf4("serialize", here.model, "--max-shard-size", "30KB", "--json")
    assert done.status == 0, done.err
    assert "-skip-shards-" in done.value["build"]
    assert f"beside {here.skip.root}" in done.err
    assert content(here.skip) == before[1]
    done = run_nf4("serialize", "skip", "--max-shard-size", "30KB", "--replace")
    assert done.status == 0, done.err
    assert content(here.skip) != before[1]
