"""Artifacts that were tampered with: every one fails, and the verdict says where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from nf4_pipeline.build_folder import Build
from nf4_pipeline.errors import ArtifactError
from nf4_pipeline.job import run_stage
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe, load_recipe
from nf4_pipeline.records import VERIFY
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import read_tensors
from tests.support.jobs import CPU
from tests.support.tamper import (
    PARTS,
    Forgery,
    agree,
    change,
    leave_in_16_bit,
    shuffle_codes,
    swap,
    zero_scale,
    zero_scale_byte,
)
from tests.support.tiny import SHARDS, copy_of, edit_json
from tests.support.verified import skip_documents, skip_readers

pytestmark = pytest.mark.usefixtures("workers_here")

UP: Final = "transformer.h.0.mlp.dense_h_to_4h"
NORM: Final = "transformer.h.1.input_layernorm.weight"
WEIGHTS: Final = "weights near those of the source"
LOADS: Final = "the artifact loads"

FORGERIES: Final[dict[str, Forgery]] = {
    "one layer's codes shuffled": shuffle_codes(f"{UP}.weight"),
    "one scale zeroed": zero_scale(f"{UP}.weight", 5),
    "one layer swapped for another's": swap(
        f"{UP}.weight", "transformer.h.1.mlp.dense_h_to_4h.weight"
    ),
    "one weight left in bf16": leave_in_16_bit(f"{UP}.weight"),
}


@pytest.fixture
def build(exported_falcon: Path, tmp_path: Path) -> Build:
    return Build(copy_of(exported_falcon, tmp_path / "build"))


@pytest.fixture
def recipe(quick_recipe: Path) -> Recipe:
    return load_recipe(quick_recipe)


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> Callable[[Build], dict[str, Any]]:
    """Runs the stage, in this process; gives what stands in verification.json."""
    skip_documents(monkeypatch)
    skip_readers(monkeypatch)

    def verify(build: Build) -> dict[str, Any]:
        record = run_stage(build, "verify", recipe, CPU, SILENT).record
        found: dict[str, Any] = json.loads((build.export / "verification.json").read_text("utf-8"))
        assert found == json.loads(json.dumps(record.facts.to_json()))
        return found

    return verify


def failed(found: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["found"] for check in found["checks"] if not check["passed"]}


def test_what_nobody_touched_passes(
    build: Build, verified: Callable[[Build], dict[str, Any]]
) -> None:
    found = verified(build)
    assert (found["verdict"], failed(found)) == ("pass", {})


@pytest.mark.parametrize("case", FORGERIES)
def test_changed_files_are_named_and_nothing_is_loaded(
    build: Build, verified: Callable[[Build], dict[str, Any]], case: str
) -> None:
    FORGERIES[case](build)
    found = verified(build)
    assert found["verdict"] == "fail"
    names = failed(found)
    assert set(names) == {"files as in the manifest", "tensors as in the manifest"}
    assert f"{SHARDS[0]} has other bytes" in names["files as in the manifest"]
    assert f"{UP}.weight" in names["tensors as in the manifest"]
    assert "models" not in found


@pytest.mark.parametrize("case", FORGERIES)
def test_files_manifest_and_records_that_agree_are_held_against_the_source(
    build: Build, verified: Callable[[Build], dict[str, Any]], case: str
) -> None:
    """A forger who writes every hash anew: only the 16-bit model, or loading, tells."""
    FORGERIES[case](build)
    agree(build)
    found = verified(build)
    assert found["verdict"] == "fail"
    (name,) = failed(found)
    assert name == (LOADS if case == "one weight left in bf16" else WEIGHTS)
    assert UP in failed(found)[name]
    # No other layer is accused.
    others = {tensor["name"] for tensor in manifest_of(build)["tensors"]} - {f"{UP}.weight"}
    assert not [other for other in others if other.removesuffix(".weight") in failed(found)[name]]


def manifest_of(build: Build) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((build.export / "manifest.json").read_text("utf-8"))
    return found


def test_a_forged_manifest_alone_is_seen(
    build: Build, verified: Callable[[Build], dict[str, Any]]
) -> None:
    edit_json(build.export / "manifest.json", model_class="OtherForCausalLM")
    assert list(failed(verified(build))) == ["manifest as serialize wrote it"]


def test_four_forgeries_at_once_are_all_counted(
    build: Build, verified: Callable[[Build], dict[str, Any]]
) -> None:
    other = "transformer.h.1"
    shuffle_codes(f"{UP}.weight")(build)
    zero_scale(f"{other}.mlp.dense_4h_to_h.weight", 100)(build)
    shuffle_codes(f"{other}.self_attention.dense.weight")(build)
    swap(
        f"{other}.self_attention.query_key_value.weight",
        f"{UP[:15]}.self_attention.query_key_value.weight",
    )(build)
    agree(build)
    names = failed(verified(build))[WEIGHTS]
    assert names.count(" has an error of ") == 3
    assert names.endswith(" and 1 more")


def drop(*names: str) -> Forgery:
    return lambda build: change(build.export, dict.fromkeys(names))


def add(build: Build) -> None:
    path = build.export / SHARDS[0]
    tensors = load_file(path)
    path.unlink()
    save_file({**tensors, "transformer.h.7.x": torch.ones(2)}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("forge", "name", "words"),
    [
        (drop(*(f"{UP}.weight{part}" for part in ("", *PARTS))), LOADS, "could not be loaded"),
        (drop(NORM), "names that the loader looked for", f"1 missing, such as {NORM}"),
    ],
)
def test_tensors_that_are_gone_from_file_and_manifest(
    build: Build,
    verified: Callable[[Build], dict[str, Any]],
    forge: Forgery,
    name: str,
    words: str,
) -> None:
    forge(build)
    agree(build)
    found = verified(build)
    assert found["verdict"] == "fail"
    assert words in failed(found)[name]


def test_a_manifest_that_says_what_cannot_be_is_refused(
    build: Build, verified: Callable[[Build], dict[str, Any]]
) -> None:
    """A 4-bit weight without its scales, however well its hashes fit."""
    drop(f"{UP}.weight.absmax")(build)
    agree(build)
    with pytest.raises(ArtifactError, match=r"not a valid manifest at tensors/\d+/stored: "):
        verified(build)
    assert build.record(VERIFY) is None


def test_a_rounding_that_nobody_knows_is_refused(
    build: Build, verified: Callable[[Build], dict[str, Any]]
) -> None:
    """How far weights may be off depends on it."""
    recipe = manifest_of(build)["recipe"]
    recipe["quantize"]["rounding"] = "anything"
    edit_json(build.export / "manifest.json", recipe=recipe)
    agree(build)
    with pytest.raises(ArtifactError, match="not a valid manifest at recipe/quantize/rounding"):
        verified(build)


def test_a_tensor_that_the_manifest_does_not_list(
    build: Build, verified: Callable[[Build], dict[str, Any]]
) -> None:
    add(build)
    agree(build)  # but for the list of tensors
    assert failed(verified(build)) == {"tensors as in the manifest": "extra: transformer.h.7.x"}


@pytest.mark.parametrize("block", [0, 9])
def test_a_scale_whose_byte_is_zeroed_is_seen_in_any_layer(
    build: Build, verified: Callable[[Build], dict[str, Any]], block: int
) -> None:
    """The byte 0 is the smallest scale of its 256, not 0: here 0.5 to 0.7 of what it was."""
    layer = "transformer.h.0.self_attention.dense"
    zero_scale_byte(f"{layer}.weight", block)(build)
    agree(build)
    assert layer in failed(verified(build)).get(WEIGHTS, "")


def test_a_kept_tensor_that_was_changed_is_named(
    build: Build, verified: Callable[[Build], dict[str, Any]]
) -> None:
    change(build.export, {NORM: read_tensors(build.export)[NORM] * 1.5})
    agree(build)
    found = verified(build)
    assert found["verdict"] == "fail"
    assert any(NORM in words for words in failed(found).values())
