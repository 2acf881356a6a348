"""A calibrated artifact derived again: from the tokens in it, on the same kind of device."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.digest import digest_file
from nf4_pipeline.checkpoint.safetensors_header import read_header
from nf4_pipeline.errors import ArtifactError, ResourceError, UsageError
from nf4_pipeline.job import run_stage
from nf4_pipeline.machine import Machine
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import QuantizeRecipe, Recipe, SerializeRecipe
from nf4_pipeline.records import QUANTIZE
from nf4_pipeline.reproduce.reproduce import reproduce

from tests.support.command_line import run_nf4
from tests.support.jobs import CPU, download
from tests.support.tiny import copy_of, flip_byte


@pytest.fixture(scope="module", autouse=True)
def workers_here() -> Iterator[None]:
    """Workers run in this process: a child imports torch each time."""
    with in_process():
        yield


def build_of(model: Path, folder: Path, read: str, extra: str = "") -> Build:
    """A calibrated build, cut into several files."""
    quantize = QuantizeRecipe(calibrate=read, calibration_tokens=256, extra_bytes=extra)
    settings = Recipe(quantize, SerializeRecipe("20KB"))
    build, *_ = download(model, folder)
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, settings, CPU, SILENT)
    return build


@pytest.fixture(scope="module")
def made(tiny_falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that was calibrated on tokens of its own, with a module left in 16 bit."""
    return build_of(tiny_falcon, tmp_path_factory.mktemp("made"), "self", "30%").export


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    """A copy of it, as somebody may have downloaded it: no build folder around it."""
    return copy_of(made, tmp_path / "artifact")


def edited(path: Path, change: Callable[[Any], object]) -> None:
    """Changes the JSON in a file, which stays as it is written otherwise."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def test_every_file_is_derived_again_from_the_tokens_in_it(
    artifact: Path, tiny_falcon: Path
) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    kept = {module["module"] for module in manifest["calibration"]["kept"]}
    assert kept
    assert not any(t["quantized"] for t in manifest["tensors"] if t.get("module") in kept)
    found = reproduce(artifact, tiny_falcon, SILENT)
    assert found.differences == []
    assert found.files == found.equal == len(manifest["files"]) + 1
    assert "calibration.json" in manifest["files"]
    assert found.calibrated_on == "cpu"


def test_it_is_not_round_to_nearest_that_is_derived(
    artifact: Path, tiny_falcon: Path, tmp_path: Path
) -> None:
    """What the manifest says of calibration is followed, and not what is easiest."""
    build, *_ = download(tiny_falcon, tmp_path / "nearest")
    run_stage(build, "quantize", Recipe(), CPU, SILENT)
    nearest = {
        name: tensor.sha256
        for file in build.need(QUANTIZE).facts.files.values()
        for name, tensor in file.tensors.items()
    }
    manifest = json.loads((artifact / "manifest.json").read_text())
    codes = {
        part["name"]: part["sha256"]
        for tensor in manifest["tensors"]
        if tensor["quantized"]
        for part in tensor["stored"]
        if part["name"] == tensor["name"]
    }
    assert len(codes) > 5
    assert all(nearest[name] != sha256 for name, sha256 in codes.items())


def test_a_changed_code_is_named_to_the_byte(artifact: Path, tiny_falcon: Path) -> None:
    path, tensor = next(
        (path, tensor)
        for path in sorted(artifact.glob("*.safetensors"))
        for tensor in read_header(path)
        if tensor.name.endswith("h.1.self_attention.dense.weight")
    )
    flip_byte(path, tensor.offset + 5)
    found = reproduce(artifact, tiny_falcon, SILENT)
    assert [(d.file, d.tensor, d.offset) for d in found.differences] == [
        (path.name, tensor.name, tensor.offset + 5)
    ]


def test_a_text_is_not_needed_again(tiny_falcon: Path, tmp_path: Path) -> None:
    """Its tokens are in the artifact; the manifest does not say where it lay."""
    text = tmp_path / "read.txt"
    text.write_text("It was a bright cold day in April, and the clocks said nothing. " * 8)
    build = build_of(tiny_falcon, tmp_path / "artifacts", str(text))
    text.unlink()
    found = reproduce(build.export, tiny_falcon, SILENT)
    assert (found.differences, found.equal) == ([], found.files)


def test_other_tokens_are_refused(artifact: Path, tiny_falcon: Path) -> None:
    path, manifest = artifact / "calibration.json", artifact / "manifest.json"
    edited(path, lambda value: value["ids"][0].__setitem__(7, 0))
    with pytest.raises(ArtifactError, match=r"calibration\.json is not the file that .* lists"):
        reproduce(artifact, tiny_falcon, SILENT)

    def list_again() -> None:
        digest = digest_file(path).to_json()
        edited(manifest, lambda value: value["files"].update({"calibration.json": digest}))

    list_again()
    with pytest.raises(ArtifactError, match="holds other tokens than the manifest says"):
        reproduce(artifact, tiny_falcon, SILENT)
    path.write_text('{"ids": "many"}')
    list_again()
    with pytest.raises(ArtifactError, match=r"calibration\.json cannot be followed"):
        reproduce(artifact, tiny_falcon, SILENT)


def test_what_was_kept_must_be_what_the_manifest_says(artifact: Path, tiny_falcon: Path) -> None:
    path, manifest = artifact / "calibration.json", artifact / "manifest.json"
    edited(path, lambda value: value.update(kept=[]))
    digest = digest_file(path).to_json()
    edited(manifest, lambda value: value["files"].update({"calibration.json": digest}))
    found = reproduce(artifact, tiny_falcon, SILENT)
    assert [d.file for d in found.differences] == ["calibration.json", "manifest.json"]
    edited(manifest, lambda value: value["calibration"]["kept"][0].update(module="h.9"))
    with pytest.raises(ArtifactError, match=r"'h\.9' was left in 16 bit .* no such module"):
        reproduce(artifact, tiny_falcon, SILENT)


def test_tokens_that_the_model_does_not_know(artifact: Path, tiny_falcon: Path) -> None:
    from nf4_pipeline.calibration.tokens import parse_tokens

    path, manifest = artifact / "calibration.json", artifact / "manifest.json"
    edited(path, lambda value: value["ids"][0].__setitem__(3, 70_000))
    digest = digest_file(path).to_json()
    sha256 = parse_tokens(json.loads(path.read_text())).sha256
    edited(manifest, lambda value: value["files"].update({"calibration.json": digest}))
    edited(manifest, lambda value: value["calibration"].update(tokens_sha256=sha256))
    with pytest.raises(ArtifactError, match="token 70000 is beyond the model's"):
        reproduce(artifact, tiny_falcon, SILENT)


def test_the_manifest_alone_is_not_enough(artifact: Path, tiny_falcon: Path) -> None:
    size = (artifact / "calibration.json").stat().st_size
    for path in artifact.iterdir():
        if path.name not in ("manifest.json", "calibration.json"):
            path.unlink()
    assert reproduce(artifact, tiny_falcon, SILENT).differences == []
    (artifact / "calibration.json").unlink()
    with pytest.raises(ArtifactError, match=rf"has no calibration\.json.*\({size:,} bytes, sha256"):
        reproduce(artifact, tiny_falcon, SILENT)
    edited(artifact / "manifest.json", lambda value: value.pop("calibration"))
    with pytest.raises(ArtifactError, match="says that codes are calibrated, but not from what"):
        reproduce(artifact, tiny_falcon, SILENT)


def test_another_kind_of_device_is_refused(
    artifact: Path, tiny_falcon: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = "the same only on the same kind"
    with pytest.raises(UsageError, match=rf"--device cuda:0.*\"cpu\".*{same}.*--device cpu"):
        reproduce(artifact, tiny_falcon, SILENT, Machine(device="cuda:0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    edited(artifact / "manifest.json", lambda value: value["calibration"].update(device="cuda"))
    with pytest.raises(ResourceError, match=rf"\"cuda\".*{same}.*no device cuda\. Run `nf4 repro"):
        reproduce(artifact, tiny_falcon, SILENT)


def test_the_command_says_how_far_equality_goes(
    artifact: Path, tiny_falcon: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("reproduce", "-q", artifact, "--source", tiny_falcon)
    flip_byte(next(artifact.glob("*.safetensors")))
    done = run_nf4(*command, "--device", "cpu")
    assert (done.status, done.err) == (1, "")
    assert re.search(
        r"differs: model-\S+ .*\ncalibrated: again, on cpu\..*\nreproduced: ", done.out
    )
    assert run_nf4(*command, "--device", "gpu").status == 2
    assert not (tmp_path / "artifacts").exists()
