"""`build` and `Artifact`: what they give, do, and refuse; on a tiny build that is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import nf4_pipeline
import pytest
from nf4_pipeline import Artifact, ProgressEvent, build
from nf4_pipeline.build_folder import Build
from nf4_pipeline.errors import (
    ArtifactError,
    BuildError,
    CheckpointError,
    PipelineError,
    RecipeError,
    ResourceError,
    SourceError,
    UsageError,
)
from nf4_pipeline.hub import Target
from nf4_pipeline.machine import Machine
from nf4_pipeline.recipe import VerifyRecipe

from tests.support.tiny import copy_of, edit_json

pytestmark = pytest.mark.usefixtures("warm_workers")

STAGES: Final = ["download", "quantize", "serialize", "verify", "attest"]


@pytest.fixture
def mine(verified: Path, tmp_path: Path) -> Path:
    """A build of the tiny model, in the place where it is looked for."""
    return copy_of(verified, tmp_path / "artifacts" / verified.name)


def test_a_build_that_is_done_is_given_as_it_is(
    mine: Path, tiny_falcon: Path, quick_recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events: list[ProgressEvent] = []
    artifact = build(
        tiny_falcon, build_dir=mine, recipe=quick_recipe, device="cpu", progress=events.append
    )
    assert artifact == Artifact.open(mine)
    assert (artifact.path, artifact.build_dir) == (mine / "export", mine)
    ended = [event for event in events if event.kind == "stage_end"]
    assert [(event.stage, event.ran) for event in ended] == [(name, False) for name in STAGES]
    assert [(event.stage_number, event.stages) for event in ended] == [(n, 5) for n in range(1, 6)]
    begun = {event.task_id for event in events if event.kind == "task_begin"}
    assert begun == {event.task_id for event in events if event.kind == "task_end"} != set()
    assert capfd.readouterr() == ("", "")


def test_what_an_artifact_says(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact.open(mine / "export")
    said = json.loads((mine / "export" / "verification.json").read_text())
    assert artifact.verdict == "pass"
    assert artifact.fidelity is not None
    assert artifact.fidelity.mean_kl.value == said["fidelity"]["mean_kl"]["value"]
    assert artifact.sizes.to_json() == json.loads(
        (mine / "export" / "manifest.json").read_text()
    ).get("totals")
    assert repr(artifact).startswith(f"Artifact('{mine}/export', verdict='pass', artifact_bytes=")
    assert len({artifact, Artifact.open(mine)}) == 1
    monkeypatch.chdir(mine.parents[1])
    for name in (None, f"artifacts/{mine.name}", Path("artifacts", mine.name, "export")):
        assert Artifact.open(name).manifest == artifact.manifest
    with pytest.raises(AttributeError):
        artifact.path = mine  # type: ignore[misc]


def test_an_artifact_that_came_from_elsewhere(mine: Path, tmp_path: Path) -> None:
    """It lies in no build: it can be asked and loaded, and neither verified nor pushed."""
    folder = copy_of(mine / "export", tmp_path / "fetched")
    artifact = Artifact.open(folder)
    assert (artifact.build_dir, artifact.verdict) == (None, "pass")
    for call in (artifact.verify, lambda: artifact.push("me/model", dry_run=True)):
        with pytest.raises(BuildError, match=f"{folder} lies in no build folder.*nf4 reproduce"):
            call()
    (folder / "verification.json").unlink()
    unverified = Artifact.open(folder)
    assert (unverified.verification, unverified.verdict, unverified.fidelity) == (None, None, None)
    assert unverified != artifact


def _no_json(export: Path) -> None:
    (export / "verification.json").write_text("{")


OPENED: Final[dict[str, tuple[Callable[[Path], object], type[PipelineError], str]]] = {
    "no manifest": (
        lambda export: (export / "manifest.json").unlink(),
        ArtifactError,
        "has no manifest.json",
    ),
    "a manifest of another shape": (
        lambda export: edit_json(export / "manifest.json", totals=3),
        ArtifactError,
        "not a valid manifest at",
    ),
    "a verification that is no JSON": (_no_json, ArtifactError, "verification.json"),
    "a verification of another shape": (
        lambda export: edit_json(export / "verification.json", verdict="good"),
        ArtifactError,
        "no valid verification at verdict",
    ),
    "no config": (
        lambda export: (export / "config.json").unlink(),
        ArtifactError,
        "a build without an export",
    ),
    "a file that leads out": (
        lambda export: (export / "vocab.json").symlink_to("/etc/passwd"),
        CheckpointError,
        "vocab.json",
    ),
}


@pytest.mark.parametrize("case", OPENED)
def test_what_is_no_artifact_is_not_opened(case: str, mine: Path) -> None:
    damage, error, message = OPENED[case]
    damage(mine / "export")
    with pytest.raises(error, match=message):
        Artifact.open(mine)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "no/such/folder",
            BuildError,
            "no/such/folder: no such folder",
        ),
        ("me/model", ArtifactError, "is no folder, and there is no build of it. An artifact on"),
        (
            "sample",
            BuildError,
            "no build of sample under /.*/artifacts. Start one: nf4 build sample",
        ),
        ("", UsageError, "empty"),
        (".", ArtifactError, "holds no model"),
        (None, BuildError, "There is no build under /.*/artifacts"),
    ],
)
def test_names_that_are_no_artifact(
    name: str | None,
    error: type[PipelineError],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        Artifact.open(name)


BUILT: Final[dict[str, tuple[Callable[[Path, Path], object], type[PipelineError], str]]] = {
    "no such model": (lambda m, _: build("no/such/model"), UsageError, "no such folder"),
    "an empty name": (lambda m, _: build(""), UsageError, "empty"),
    "no checkpoint": (lambda m, where: build(where), SourceError, "config.json"),
    "a revision of a folder": (lambda m, _: build(m, revision="main"), UsageError, "means nothing"),
    "no such recipe": (lambda m, _: build(m, recipe="no.toml"), RecipeError, "no.toml"),
    "no such text": (lambda m, _: build(m, calibrate="no.txt"), RecipeError, "no.txt"),
    "no GPU": (
        lambda m, _: build(m, device="cpu", require_gpu=True),
        ResourceError,
        "A GPU is required",
    ),
}


@pytest.mark.parametrize("case", BUILT)
def test_what_cannot_be_built_leaves_nothing(
    case: str, tiny_falcon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, error, message = BUILT[case]
    where = tmp_path / "where"
    where.mkdir()
    monkeypatch.chdir(where)
    with pytest.raises(error, match=message):
        call(tiny_falcon, where)
    assert list(where.iterdir()) == []


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), OSError("enough")], ids=repr)
@pytest.mark.parametrize("stage", STAGES)
def test_a_callback_ends_a_build_that_goes_on_later(
    stage: str, raised: BaseException, mine: Path, tiny_falcon: Path, quick_recipe: Path
) -> None:
    """An interrupt stays one, so that no loop over models goes on after it; its text says more."""

    def stop(event: ProgressEvent) -> None:
        if event.stage == stage:
            raise raised

    def again(progress: Callable[[ProgressEvent], None] | None = None) -> Artifact:
        return build(
            tiny_falcon, build_dir=mine, recipe=quick_recipe, device="cpu", progress=progress
        )

    with pytest.raises(type(raised)) as caught:
        again(stop)
    if isinstance(raised, KeyboardInterrupt):
        assert f"Stopped in {stage}." in str(caught.value)
    else:
        assert caught.value is raised
    assert again().verdict == "pass"


def test_it_is_verified_with_what_was_said(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict is a result."""
    ran: list[tuple[Any, ...]] = []

    def run_stage(build: Build, name: str, recipe: Any, machine: Any, _: Any, **more: Any) -> None:
        ran.append((build.root, name, recipe.recipe.verify, machine, more))
        edit_json(mine / "export" / "verification.json", verdict="fail")

    monkeypatch.setattr("nf4_pipeline.job.run_stage", run_stage)
    artifact = Artifact.open(mine)
    measured = artifact.verify(
        recipe={"verify": {"max_mean_kl": 0.25}},
        prompts=mine / "p.jsonl",
        eval_tokens=32,
        against=mine.parent,
        device="cpu",
        device_memory="1GB",
        engine="ray",
        ray_address="auto",
    )
    assert (measured.verdict, artifact.verdict) == ("fail", "pass")  # the other one is as it was
    recipe = VerifyRecipe(prompts=str(mine / "p.jsonl"), eval_tokens=32, max_mean_kl=0.25)
    machine = Machine(device="cpu", device_memory=10**9, engine="ray", ray_address="auto")
    assert ran == [(mine, "verify", recipe, machine, {"against": str(mine.parent)})]


def test_what_would_be_pushed(mine: Path) -> None:
    upload = Artifact.open(mine).push("me/model", private=True, create_pr=True, dry_run=True)
    assert upload.target == Target("me/model", private=True, pull_request=True)
    assert (upload.verdict, upload.folder) == ("pass", mine / "export")
    assert {*upload.files} >= {"README.md", "manifest.json", "provenance.json"}
    (mine / "export" / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not what was verified"):
        Artifact.open(mine).push("me/model", dry_run=True)


def test_methods_ask_the_artifact_itself(mine: Path, workers_here: None) -> None:
    artifact = Artifact.open(mine)
    asked = artifact.prompt("Hello", max_new_tokens=4, device="cpu")
    assert asked == nf4_pipeline.prompt("Hello", mine, max_new_tokens=4, device="cpu")
    model = artifact.load(device="cpu")
    assert model.is_loaded_in_4bit
    assert artifact.load_tokenizer()("Hello").input_ids
    with pytest.raises(UsageError, match="revision"):
        artifact.load(revision="main")
