"""Reloaded layers: a good artifact passes, and of every bad one it is named what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Final

import pytest
from nf4_pipeline.fidelity.verdict import Check
from nf4_pipeline.manifest.manifest import CalibrationSummary, Manifest
from nf4_pipeline.manifest.read import read_manifest
from nf4_pipeline.verification.check_model import (
    check_kept,
    check_reloaded,
    check_weights,
    report_unloadable,
)
from nf4_pipeline.verification.document import BlockError, LayerError
from nf4_pipeline.verification.messages import ArtifactReply, LoadedModel

GOLDEN: Final = Path(__file__).with_name("golden")
UP: Final = "transformer.h.0.mlp.dense_h_to_4h"


@pytest.fixture(scope="module")
def manifest(exported_falcon: Path) -> Manifest:
    return read_manifest(exported_falcon / "export")


def failed(checks: list[Check]) -> dict[str, str]:
    """What the checks that do not pass found, by name."""
    return {check.name: check.found for check in checks if not check.passed}


def test_an_artifact_that_does_not_load() -> None:
    check = report_unloadable("no scales")
    assert (check.passed, check.found) == (False, "no scales")


@pytest.fixture
def loaded(manifest: Manifest) -> ArtifactReply:
    """What a worker replies of the artifact if all is well; of the comparison it is made up."""
    golden = json.loads((GOLDEN / "artifact_reply.json").read_text("utf-8"))
    quantized = [tensor for tensor in manifest.tensors if tensor.quantized]
    kept = [tensor for tensor in manifest.tensors if not tensor.quantized]
    memory = LoadedModel(
        linear4bit=tuple(str(tensor.module) for tensor in quantized),
        code_bytes=sum(prod(tensor.shape) for tensor in quantized) // 2,
        kept_weights=sum(prod(tensor.shape) for tensor in kept),
    )
    return replace(ArtifactReply.from_json(golden), memory=memory)


def test_a_good_reload(manifest: Manifest, loaded: ArtifactReply) -> None:
    assert failed(check_reloaded(manifest, loaded)) == {}
    assert [check.name for check in check_reloaded(manifest, loaded)] == [
        "Linear4bit modules after reloading",
        "names that the loader looked for",
        "what is in memory",
    ]


def less_layers(loaded: ArtifactReply) -> ArtifactReply:
    layers = tuple(name for name in loaded.memory.linear4bit if name != UP)
    return replace(loaded, memory=replace(loaded.memory, linear4bit=layers))


def more_layers(loaded: ArtifactReply) -> ArtifactReply:
    layers = (*loaded.memory.linear4bit, "lm_head")
    return replace(loaded, memory=replace(loaded.memory, linear4bit=layers))


def missing_name(loaded: ArtifactReply) -> ArtifactReply:
    return replace(loaded, missing=("transformer.ln_f.bias", "transformer.ln_f.weight"))


def unexpected_name(loaded: ArtifactReply) -> ArtifactReply:
    return replace(loaded, unexpected=("transformer.h.9.mlp.weight",))


def less_codes(loaded: ArtifactReply) -> ArtifactReply:
    fewer = loaded.memory.code_bytes - 1
    return replace(loaded, memory=replace(loaded.memory, code_bytes=fewer))


def more_kept(loaded: ArtifactReply) -> ArtifactReply:
    more = loaded.memory.kept_weights + 1
    return replace(loaded, memory=replace(loaded.memory, kept_weights=more))


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (less_layers, "Linear4bit modules after reloading", f"{UP} is not Linear4bit"),
        (
            more_layers,
            "Linear4bit modules after reloading",
            "lm_head is Linear4bit and should not be",
        ),
        (
            missing_name,
            "names that the loader looked for",
            "2 missing, such as transformer.ln_f.bias",
        ),
        (
            unexpected_name,
            "names that the loader looked for",
            "1 unexpected, such as transformer.h.9.mlp.weight",
        ),
        (less_codes, "what is in memory", "bytes of codes"),
        (more_kept, "what is in memory", "weights beside them"),
    ],
)
def test_what_did_not_come_back_is_named(
    manifest: Manifest,
    loaded: ArtifactReply,
    change: Callable[[ArtifactReply], ArtifactReply],
    name: str,
    words: str,
) -> None:
    found = failed(check_reloaded(manifest, change(loaded)))
    assert list(found) == [name]
    assert words in found[name]


@pytest.fixture
def blocks(manifest: Manifest) -> dict[str, dict[str, LayerError]]:
    """What a comparison finds if every layer is as the manifest promises: by block, by layer."""
    errors: dict[str, dict[str, LayerError]] = {}
    for number in range(2):
        block = f"transformer.h.{number}"
        errors[block] = {
            name: LayerError(
                name=name,
                relative_error=0.1,
                weight_error=tensor.relative_rmse,
                worst=0.13,
                worst_at=3,
            )
            for tensor in manifest.tensors
            if tensor.quantized and str(tensor.module).startswith(f"{block}.")
            for name in [str(tensor.module).removeprefix(f"{block}.")]
        }
    return errors


def changed(
    blocks: dict[str, dict[str, LayerError]], change: dict[str, Any], layer: str = UP
) -> None:
    block, name = layer[:15], layer[16:]
    blocks[block][name] = replace(blocks[block][name], **change)


def listed(blocks: dict[str, dict[str, LayerError]]) -> list[BlockError]:
    return [
        BlockError(name=name, relative_error=0.1, modules=tuple(layers.values()))
        for name, layers in blocks.items()
    ]


def test_good_weights(manifest: Manifest, blocks: dict[str, dict[str, LayerError]]) -> None:
    check = check_weights(manifest, listed(blocks), [])
    assert check.passed
    assert check.found == ("8 layers; no weight is off by more than 13.0% of the largest of its 64")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"worst": 0.51}, f"{UP} has an error of 51% of the largest of 64 weights, at weights 192"),
        ({"worst": 2.0, "worst_at": 0}, f"{UP} has an error of 200% of the largest of 64 weights"),
        ({"weight_error": 0.2}, f"{UP} is off by 0.2000, not by 0.09"),
        ({"weight_error": 0.01}, f"{UP} is off by 0.0100, not by 0.09"),
        (
            {"scale": 0.03, "scale_at": 2},
            f"{UP} has a scale that is off by 3.0% of its nested scale, at weights 128 and on",
        ),
        ({"scale": None, "scale_at": 0}, f"{UP} has a scale that is not finite"),
        ({"weight_error": None}, f"{UP} is not finite"),
        ({"worst": None}, f"{UP} is not finite"),
    ],
)
def test_a_weight_that_is_far_from_its_source_is_named(
    manifest: Manifest, blocks: dict[str, dict[str, LayerError]], change: dict[str, Any], words: str
) -> None:
    changed(blocks, change)
    check = check_weights(manifest, listed(blocks), [])
    assert not check.passed
    assert words in check.found
    assert ";" not in check.found  # and no other


def test_the_worst_layers_come_first_and_no_more_than_three(
    manifest: Manifest, blocks: dict[str, dict[str, LayerError]]
) -> None:
    for number, (block, layers) in enumerate(blocks.items()):
        for place, name in enumerate(list(layers)):
            changed(blocks, {"worst": 1 + number + place / 10}, f"{block}.{name}")
    changed(blocks, {"worst": None}, "transformer.h.0.self_attention.dense")
    check = check_weights(manifest, listed(blocks), [])
    first, *others = check.found.split("; ")
    assert first == "transformer.h.0.self_attention.dense is not finite"
    assert len(others) == 2
    assert all(words.startswith("transformer.h.1.") for words in others)
    assert others[-1].endswith(" and 5 more")


def test_a_layer_that_should_not_be_4_bit_is_left_to_the_check_of_modules(
    manifest: Manifest, blocks: dict[str, dict[str, LayerError]]
) -> None:
    """The manifest says that it is kept in 16 bit, and it came back in 4."""
    tensors = tuple(
        replace(tensor, quantized=False) if tensor.module == UP else tensor
        for tensor in manifest.tensors
    )
    assert check_weights(replace(manifest, tensors=tensors), listed(blocks), []).passed


def test_a_layer_that_was_not_compared_is_named(
    manifest: Manifest, blocks: dict[str, dict[str, LayerError]]
) -> None:
    """Such as the projections that OPT has outside its blocks."""
    del blocks["transformer.h.0"]["mlp.dense_h_to_4h"]
    check = check_weights(manifest, listed(blocks), [])
    assert not check.passed
    assert UP in check.found


CALIBRATED: Final = {"quantize": {"rounding": "calibrated"}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"worst": 2.9, "worst_at": 0}, None),
        ({"scale": 0.5, "scale_at": 2, "reach": 1.2, "reach_at": 2}, None),
        ({"scale": None, "scale_at": 2}, None),  # its group is stored as zeros
        (
            {"scale": 0.5, "scale_at": 2, "reach": 2.1, "reach_at": 4},
            f"{UP} has a scale that is 210% of the largest of its 64 weights, at weights 256",
        ),
        ({"reach": None, "reach_at": 0}, f"{UP} has a scale that is not finite"),
        ({"weight_error": 0.2}, f"{UP} is off by 0.2000, not by 0.09"),
        ({"worst": None}, f"{UP} is not finite"),
    ],
)
def test_calibrated_weights_may_be_further_off_but_not_anything(
    manifest: Manifest,
    blocks: dict[str, dict[str, LayerError]],
    change: dict[str, Any],
    words: str | None,
) -> None:
    changed(blocks, change)
    check = check_weights(replace(manifest, recipe=CALIBRATED), listed(blocks), [])
    assert check.passed is (words is None)
    assert (words or "8 layers") in check.found
    assert check.expected.startswith("no scale beyond 2 times the largest of its 64 weights")


@pytest.mark.parametrize("rounding", ["nearest", "calibrated"])
def test_codes_that_have_nothing_to_do_with_their_weights_are_named_whatever_was_promised(
    manifest: Manifest, blocks: dict[str, dict[str, LayerError]], rounding: str
) -> None:
    """Those of another layer, within every bound on a single weight."""
    tensors = tuple(
        replace(tensor, relative_rmse=1.1) if tensor.module == UP else tensor
        for tensor in manifest.tensors
    )
    changed(blocks, {"weight_error": 1.1, "worst": 0.4, "reach": 1.0})
    forged = replace(manifest, tensors=tensors, recipe={"quantize": {"rounding": rounding}})
    check = check_weights(forged, listed(blocks), [])
    assert check.found == f"{UP} is off by 110% of its weights"


def test_what_was_rounded_to_nearest_after_all_is_held_to_that(
    manifest: Manifest, blocks: dict[str, dict[str, LayerError]]
) -> None:
    """Its double quantization gives near-zero blocks any small scale; its errors are small."""
    summary = CalibrationSummary(
        source="self",
        sequences=1,
        tokens=256,
        tokens_sha256="0" * 64,
        device="cpu",
        fallbacks={f"{UP}.weight": "only 3 tokens came to it"},
        kept=(),
        extra_bytes=0,
    )
    manifest = replace(manifest, recipe=CALIBRATED, calibration=summary)
    changed(blocks, {"reach": 9.0, "reach_at": 4})
    assert check_weights(manifest, listed(blocks), []).passed
    changed(blocks, {"worst": 0.6})
    assert f"{UP} has an error of 60%" in check_weights(manifest, listed(blocks), []).found


def test_the_scales_of_nearest_may_reach_as_far_as_they_are_stored(
    manifest: Manifest, blocks: dict[str, dict[str, LayerError]]
) -> None:
    """Blocks of near-zeros get any small scale."""
    changed(blocks, {"reach": 9.0, "reach_at": 4})
    assert check_weights(manifest, listed(blocks), []).passed


def test_what_was_copied_and_changed_is_named() -> None:
    assert check_kept(7, []).found == "7 parameters, all equal"
    check = check_kept(7, ["a", "b", "c", "d"])
    assert (check.passed, check.found) == (False, "different: a, b, c and 1 more")
