"""Verify from outside: what it lets pass, and what it names when it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.build import Build
from pipeline.job import run_stage
from pipeline.progress import SILENT
from pipeline.recipe import Recipe, VerifyRecipe
from pipeline.stages import Settings, download
from tests.support.tiny import copy_of, flip_byte

SETTINGS = Settings(
    recipe=Recipe(verify=VerifyRecipe(max_new_tokens=2, eval_tokens=64)), device="cpu"
)


@pytest.fixture(scope="module")
def exported(tiny_falcon: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of a checkpoint without a tokenizer, up to serialize."""
    folder = tmp_path_factory.mktemp("verify")
    model = copy_of(tiny_falcon, folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    build, *_ = download.run(str(model), folder / "artifacts", SILENT)
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, SETTINGS, SILENT)
    return build.root


def _verify(build: Build) -> dict[str, dict[str, object]]:
    record = run_stage(build, "verify", SETTINGS, SILENT).record
    found = json.loads((build.export / "verification.json").read_text("utf-8"))
    assert found == json.loads(json.dumps(record.facts))
    assert found["verdict"] in (build.export / "README.md").read_text("utf-8")
    return {check["name"]: check for check in found["checks"]} | {"": found}


def test_without_a_tokenizer_the_models_are_compared_on_token_ids(
    exported: Path, tmp_path: Path
) -> None:
    found = _verify(Build(copy_of(exported, tmp_path / "build")))
    assert found[""]["verdict"] == "pass"
    assert found[""]["answers"] == []
    fidelity = found[""]["fidelity"]
    assert isinstance(fidelity, dict)
    assert fidelity["tokens"] == 63
    assert 0 < fidelity["mean_kl"] < 0.5


def test_a_flipped_bit_is_named_and_nothing_is_loaded(exported: Path, tmp_path: Path) -> None:
    build = Build(copy_of(exported, tmp_path / "build"))
    shard = sorted(build.export.glob("*.safetensors"))[0]
    flip_byte(shard, -1)
    found = _verify(build)
    assert found[""]["verdict"] == "fail"
    assert shard.name in str(found["files as in the manifest"]["found"])
    assert "different" in str(found["tensors as in the manifest"]["found"])
    assert "fidelity" not in found[""]


def test_a_layer_that_does_not_come_back_in_4_bit_is_named(exported: Path, tmp_path: Path) -> None:
    """As in the trap: the files are whole, but a loader passes a module over."""
    from pipeline.proof.gates import reload_gate

    manifest = json.loads((exported / "export" / "manifest.json").read_text("utf-8"))
    modules = [tensor["module"] for tensor in manifest["tensors"] if tensor["quantized"]]
    assert reload_gate(manifest, modules).passed
    missing = reload_gate(manifest, modules[1:])
    assert not missing.passed
    assert f"{modules[0]} is not Linear4bit" in missing.found
    extra = reload_gate(manifest, [*modules, "lm_head"])
    assert not extra.passed
    assert "lm_head" in extra.found
