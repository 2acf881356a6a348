"""An artifact derived again from its source: equal bytes, or the first that differs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint import sink
from nf4_pipeline.checkpoint.safetensors_header import read_header
from nf4_pipeline.errors import ArtifactError, SourceError, UsageError
from nf4_pipeline.job import run_stage
from nf4_pipeline.machine import Machine
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import QuantizeRecipe, Recipe, SerializeRecipe
from nf4_pipeline.records import QUANTIZE
from nf4_pipeline.reproduce.compare_files import Difference
from nf4_pipeline.reproduce.reproduce import reproduce

from tests.support import warm
from tests.support.checkpoints import make_checkpoint
from tests.support.command_line import run_nf4
from tests.support.hub_client import isolated
from tests.support.hub_server import HubServer
from tests.support.jobs import CPU, download
from tests.support.tiny import SHARDS, copy_of, edit_json, flip_byte, nf4

pytestmark = pytest.mark.usefixtures("workers_here")

CUT = Recipe(serialize=SerializeRecipe("20KB"))


def build_of(model: Path, folder: Path, settings: Recipe) -> Build:
    build, *_ = download(model, folder / "artifacts")
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, settings, CPU, SILENT)
    return build


@dataclass(frozen=True)
class Made:
    model: Path
    export: Path


@pytest.fixture(scope="module")
def made(tiny_falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An artifact whose weights are cut into several files."""
    build = build_of(tiny_falcon, tmp_path_factory.mktemp("made"), CUT)
    return Made(tiny_falcon, build.export)


@pytest.fixture
def artifact(made: Made, tmp_path: Path) -> Path:
    """A copy of it, as somebody may have downloaded it: no build folder around it."""
    return copy_of(made.export, tmp_path / "artifact")


def test_every_file_is_derived_again(made: Made, artifact: Path) -> None:
    found = reproduce(artifact, made.model, SILENT)
    files = json.loads((artifact / "manifest.json").read_text())["files"]
    assert found.differences == []
    assert found.files == found.equal == len(files) + 1
    assert len([name for name in files if name.endswith(".safetensors")]) > 3


def test_from_the_manifest_alone(made: Made, artifact: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    manifest = json.loads((artifact / "manifest.json").read_text())
    (alone / "manifest.json").write_bytes((artifact / "manifest.json").read_bytes())
    found = reproduce(alone, made.model, SILENT)
    assert (found.differences, found.equal) == ([], found.files)
    weights = next(name for name in manifest["files"] if name.endswith(".safetensors"))
    manifest["files"][weights]["sha256"] = "0" * 64
    (alone / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    found = reproduce(alone, made.model, SILENT)
    assert weights in {difference.file for difference in found.differences}


@pytest.mark.parametrize("kind", ["falcon-7b", "llama", "gpt2", "bloom"])
@pytest.mark.parametrize("held", [0, 64 * 2**20])
def test_awkward_sizes_and_transposed_weights(
    kind: str, held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole shards, with tensors of odd lengths that stand elsewhere than they are made."""
    monkeypatch.setattr(sink.HashingSink.__init__, "__defaults__", (held,))
    model = make_checkpoint(
        tmp_path / kind, kind, max_shard_size="60KB", stored_head=kind != "llama"
    )
    build = build_of(model, tmp_path, Recipe())
    found = reproduce(build.export, model, SILENT, Machine(workers=3, memory_budget=8 * 2**20))
    assert (found.differences, found.equal) == ([], found.files)


def test_a_recipe_and_twins_that_differ(tmp_path: Path, tiny_falcon: Path) -> None:
    """The manifest's recipe is followed, and a head that is no twin after all is found again."""
    import torch
    from safetensors.torch import load_file, save_file

    model = copy_of(tiny_falcon, tmp_path / "model")
    tensors = load_file(model / SHARDS[1])
    tensors["lm_head.weight"] += torch.ones(1, dtype=torch.bfloat16)
    save_file(tensors, model / SHARDS[1], metadata={"format": "pt"})
    settings = Recipe(quantize=QuantizeRecipe(("h.0.mlp",)))
    build = build_of(model, tmp_path, settings)
    assert build.need(QUANTIZE).facts.untied == ("lm_head.weight",)
    assert reproduce(build.export, model, SILENT).differences == []


def weight_files(artifact: Path) -> list[Path]:
    return sorted(artifact.glob("*.safetensors"))


@pytest.mark.parametrize("number", [0, 3, 5])
@pytest.mark.parametrize("position", [0, -1])
def test_a_changed_weight_is_named_to_the_byte(
    made: Made, artifact: Path, number: int, position: int
) -> None:
    path = weight_files(artifact)[1]
    tensor = read_header(path)[number]
    place = tensor.offset + position % tensor.nbytes
    flip_byte(path, place)
    found = reproduce(artifact, made.model, SILENT)
    assert [(d.file, d.tensor, d.offset) for d in found.differences] == [
        (path.name, tensor.name, place)
    ]
    assert found.equal == found.files - 1


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def change_manifest(artifact: Path) -> None:
    """One hash in the manifest is another; the file that it lists is right."""
    path = artifact / "manifest.json"
    sha256 = json.loads(path.read_text())["files"]["config.json"]["sha256"]
    path.write_text(path.read_text().replace(sha256, "0" * 64))


CHANGES: dict[str, tuple[Callable[[Path], object], str, str, str | None]] = {
    "config": (lambda a: flip_byte(a / "config.json", 30), "config.json", "has sha256", None),
    "tokenizer": (lambda a: longer(a / "tokenizer.json"), "tokenizer.json", "bytes, expec", None),
    "index": (
        lambda a: flip_byte(a / "model.safetensors.index.json"),
        "model.safetensors.index.json",
        "has sha256",
        None,
    ),
    "header": (lambda a: flip_byte(weight_files(a)[0], 20), "", "has sha256", "(header)"),
    "longer": (lambda a: longer(weight_files(a)[0]), "", "bytes, expected", None),
    "missing": (lambda a: weight_files(a)[0].unlink(), "", "is missing", None),
    "manifest": (change_manifest, "config.json", "the manifest lists 0000", None),
    "stranger": (
        lambda a: shutil.copy(weight_files(a)[0], a / "more.safetensors"),
        "more.safetensors",
        "the source does not make it",
        None,
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_any_other_change_is_named(made: Made, artifact: Path, case: str) -> None:
    change, name, what, tensor = CHANGES[case]
    name = name or weight_files(artifact)[0].name
    change(artifact)
    found = reproduce(artifact, made.model, SILENT)
    first = next(d for d in found.differences if d.file == name)
    assert what in first.what
    assert first.tensor == tensor
    assert found.equal == found.files - len(found.differences) < found.files
    if case == "config":
        assert first.offset == 30
    if case == "header":
        assert first.offset == 20


def test_only_the_pinned_source_is_taken(made: Made, artifact: Path, tmp_path: Path) -> None:
    other = copy_of(made.model, tmp_path / "other")
    flip_byte(other / SHARDS[1])
    with pytest.raises(SourceError, match=f"{SHARDS[1]} of .*expected .* found"):
        reproduce(artifact, other, SILENT)
    lacking = copy_of(made.model, tmp_path / "lacking")
    (lacking / "tokenizer_config.json").unlink()
    with pytest.raises(SourceError, match=r"lacks tokenizer_config\.json"):
        reproduce(artifact, lacking, SILENT)
    with pytest.raises(UsageError, match=r"local folder named 'tiny-falcon'.*--source DIR"):
        reproduce(artifact, None, SILENT)


def test_a_source_with_a_licence_more_is_still_the_source(
    made: Made, artifact: Path, tmp_path: Path
) -> None:
    other = copy_of(made.model, tmp_path / "other")
    (other / "LICENSE").write_text("as you like")
    assert reproduce(artifact, other, SILENT).differences == []


def test_a_manifest_that_cannot_be_followed(artifact: Path, made: Made) -> None:
    recipe = {"quantize": {"rounding": "nearest", "bits": 2}, "serialize": {}}
    edit_json(artifact / "manifest.json", recipe=recipe)
    with pytest.raises(ArtifactError, match=r"recipe that this version cannot follow.*'bits'"):
        reproduce(artifact, made.model, SILENT)
    (artifact / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        reproduce(artifact, made.model, SILENT)


def test_a_manifest_cannot_point_out_of_its_folder(artifact: Path, made: Made) -> None:
    path = artifact / "manifest.json"
    for name in ("../secret", "/etc/hostname", "a/../../b", "a\\b", ""):
        value = json.loads(path.read_text())
        value["files"][name] = value["files"].pop("config.json", {"size": 1, "sha256": "0" * 64})
        (artifact / "manifest.json").write_text(json.dumps(value))
        with pytest.raises(ArtifactError, match="not a valid manifest at files"):
            reproduce(artifact, made.model, SILENT)


def test_the_command(
    made: Made, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = nf4("reproduce", "-q", artifact, "--source", made.model, cwd=tmp_path)
    assert (done.status, done.err) == (0, "")
    assert re.search(r"reproduced: (\d+) of \1 files\n$", done.out)
    path = weight_files(artifact)[2]
    tensor = read_header(path)[0]
    flip_byte(path, tensor.offset + 3)
    done = run_nf4("reproduce", "-q", artifact, "--source", made.model, "--json")
    assert (done.status, done.err) == (1, "")
    assert done.value["differences"] == [
        Difference(
            path.name, done.value["differences"][0]["what"], tensor.name, tensor.offset + 3
        ).to_json()
    ]
    done = run_nf4("reproduce", "-q", artifact, "--source", made.model)
    assert f"first in {tensor.name} at byte {tensor.offset + 3:,}" in done.out
    assert run_nf4("reproduce", tmp_path / "none").status == 1
    assert not (tmp_path / "artifacts").exists()


def test_a_published_artifact_from_the_hub(made: Made, tmp_path: Path) -> None:
    """From the manifest alone: the Hub is asked for the commit that it pins, and for no other."""
    with HubServer() as hub:
        repo = hub.store.add("some-org/tiny", made.model)
        commit = repo.refs["main"]
        own = isolated(tmp_path / "hf", hub.url, CUDA_VISIBLE_DEVICES="", TMPDIR=str(tmp_path))
        home = warm.variables(own)
        recipe = tmp_path / "recipe.toml"
        recipe.write_text('[serialize]\nmax_shard_size = "20KB"\n')

        def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "nf4_pipeline", *map(str, args)]
            return subprocess.run(
                command, env=home, cwd=tmp_path, capture_output=True, text=True, check=False
            )

        assert run("download", "some-org/tiny", "--build-dir", "b").returncode == 0
        for stage in ("quantize", "serialize"):
            done = run(stage, "--build-dir", "b", "--recipe", recipe)
            assert done.returncode == 0, done.stderr
        repo.commit({SHARDS[0]: b"another state of main"})
        published = copy_of(tmp_path / "b" / "export", tmp_path / "published")
        shutil.rmtree(tmp_path / "hf")
        done = run("reproduce", published)
        assert done.returncode == 0, done.stderr + done.stdout
        assert f"some-org/tiny at {commit}" in done.stdout
        assert re.search(r"reproduced: (\d+) of \1 files\n$", done.stdout)
        assert not list(tmp_path.glob("nf4-reproduce*"))
