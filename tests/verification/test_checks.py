"""Each gate: a good artifact passes, and of every kind of bad one it names what is wrong."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.fidelity.verdict import Check
from nf4_pipeline.verification.checks import (
    file_gates,
    load_gate,
    manifest_gate,
    reload_gates,
    weights_gate,
)
from safetensors.torch import load_file, save_file

from tests.support.tamper import leave_in_16_bit, shuffle_codes, swap, zero_scale, zero_scale_byte
from tests.support.tiny import SHARDS, copy_of, edit_json, flip_byte

UP: Final = "transformer.h.0.mlp.dense_h_to_4h"
OTHER: Final = "transformer.h.1.mlp.dense_h_to_4h"
FILES, TENSORS = "files as in the manifest", "tensors as in the manifest"


@pytest.fixture
def build(exported_falcon: Path, tmp_path: Path) -> Build:
    return Build(copy_of(exported_falcon, tmp_path / "build"))


@pytest.fixture(scope="module")
def manifest(exported_falcon: Path) -> dict[str, Any]:
    path = exported_falcon / "export" / "manifest.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def failed(checks: list[Check]) -> dict[str, str]:
    """What the checks that do not pass found, by name."""
    return {check.name: check.found for check in checks if not check.passed}


def test_a_good_artifact(build: Build, manifest: dict[str, Any]) -> None:
    files, tensors = file_gates(build.export, manifest)
    assert (files.name, files.passed) == (FILES, True)
    assert files.found == f"{len(manifest['files'])} files hash right"
    assert (tensors.name, tensors.passed) == (TENSORS, True)
    count = sum(len(tensor["stored"]) for tensor in manifest["tensors"])
    assert tensors.found == f"{count} tensors as listed"


# What forges one tensor of a file, and how the gate names it.
FORGED: Final[dict[str, tuple[Callable[[Build], None], str]]] = {
    "codes shuffled": (shuffle_codes(f"{UP}.weight"), f"different: {UP}.weight"),
    "a scale zeroed": (zero_scale(f"{UP}.weight", 5), f"different: {UP}.weight.absmax"),
    "a scale's byte zeroed": (zero_scale_byte(f"{UP}.weight", 5), f"different: {UP}.weight.absmax"),
    "another layer's": (swap(f"{UP}.weight", f"{OTHER}.weight"), f"different: {UP}.weight"),
    "left in 16 bit": (leave_in_16_bit(f"{UP}.weight"), f"missing: {UP}.weight.absmax"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_tensor_is_named(build: Build, manifest: dict[str, Any], case: str) -> None:
    forge, words = FORGED[case]
    forge(build)
    found = failed(file_gates(build.export, manifest))
    assert set(found) == {FILES, TENSORS}
    assert f"{SHARDS[0]} has other bytes" in found[FILES]
    assert words in found[TENSORS]


def test_one_bit_of_any_tensor_is_seen(build: Build, manifest: dict[str, Any]) -> None:
    """The first and the last byte of the data, and one in the header."""
    for position in (-1, 12, None):
        shard = build.export / SHARDS[1]
        before = shard.read_bytes()
        length = int.from_bytes(before[:8], "little")
        flip_byte(shard, 8 + length if position is None else position)
        found = failed(file_gates(build.export, manifest))
        assert SHARDS[1] in found[FILES]
        assert TENSORS in found
        shard.unlink()
        shard.write_bytes(before)
    assert failed(file_gates(build.export, manifest)) == {}


def test_a_small_file_that_changed(build: Build, manifest: dict[str, Any]) -> None:
    edit_json(build.export / "config.json", rope_theta=1.0)
    assert list(failed(file_gates(build.export, manifest))) == [FILES]
    assert "config.json has other bytes" in failed(file_gates(build.export, manifest))[FILES]


def test_a_file_that_is_gone(build: Build, manifest: dict[str, Any]) -> None:
    (build.export / SHARDS[1]).unlink()
    found = failed(file_gates(build.export, manifest))
    assert found[FILES] == f"{SHARDS[1]} is missing"
    assert found[TENSORS].startswith("missing: transformer.h.1.")
    assert " more" in found[TENSORS]


def test_a_file_that_is_cut_short(build: Build, manifest: dict[str, Any]) -> None:
    os.truncate(build.export / SHARDS[0], 3000)
    found = failed(file_gates(build.export, manifest))
    assert SHARDS[0] in found[FILES]
    assert "missing: " in found[TENSORS]


def test_a_weight_file_that_nobody_listed(build: Build, manifest: dict[str, Any]) -> None:
    save_file({"x": torch.zeros(2)}, build.export / "adapter_model.safetensors")
    assert failed(file_gates(build.export, manifest)) == {
        FILES: "adapter_model.safetensors is not in the manifest"
    }


def test_a_tensor_that_nobody_listed(build: Build, manifest: dict[str, Any]) -> None:
    path = build.export / SHARDS[0]
    tensors = load_file(path)
    path.unlink()
    save_file({**tensors, "stray": torch.zeros(2)}, path, metadata={"format": "pt"})
    found = failed(file_gates(build.export, manifest))
    assert found[TENSORS] == "extra: stray"


def test_many_wrong_files_are_three_words_long(build: Build, manifest: dict[str, Any]) -> None:
    for name in manifest["files"]:
        (build.export / name).unlink()
    found = failed(file_gates(build.export, manifest))
    assert found[FILES].count(" is missing") == 3


def test_the_manifest_itself() -> None:
    recorded = FileDigest(10, "a" * 64)
    assert manifest_gate(FileDigest(10, "a" * 64), recorded).passed
    forged = manifest_gate(FileDigest(10, "b" * 64), recorded)
    assert not forged.passed
    assert ("bbbb" in forged.found, "aaaa" in forged.expected) == (True, True)
    assert not manifest_gate(FileDigest(11, "a" * 64), recorded).passed


def test_an_artifact_that_does_not_load() -> None:
    check = load_gate("no scales")
    assert (check.passed, check.found) == (False, "no scales")


@pytest.fixture
def loaded(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a worker reports of the artifact if all is well."""
    quantized = [tensor for tensor in manifest["tensors"] if tensor["quantized"]]
    kept = [tensor for tensor in manifest["tensors"] if not tensor["quantized"]]
    weights = [torch.Size(tensor["shape"]).numel() for tensor in quantized]
    return {
        "memory": {
            "linear4bit": [tensor["module"] for tensor in quantized],
            "code_bytes": sum(weights) // 2,
            "kept_weights": sum(torch.Size(tensor["shape"]).numel() for tensor in kept),
        },
        "missing": [],
        "unexpected": [],
    }


def test_a_good_reload(manifest: dict[str, Any], loaded: dict[str, Any]) -> None:
    assert failed(reload_gates(manifest, loaded)) == {}
    assert [check.name for check in reload_gates(manifest, loaded)] == [
        "Linear4bit modules after reloading",
        "names that the loader looked for",
        "what is in memory",
    ]


def less_layers(loaded: dict[str, Any]) -> None:
    loaded["memory"]["linear4bit"].remove(UP)


def more_layers(loaded: dict[str, Any]) -> None:
    loaded["memory"]["linear4bit"].append("lm_head")


def missing_name(loaded: dict[str, Any]) -> None:
    loaded["missing"] += ["transformer.ln_f.bias", "transformer.ln_f.weight"]


def unexpected_name(loaded: dict[str, Any]) -> None:
    loaded["unexpected"].append("transformer.h.9.mlp.weight")


def less_codes(loaded: dict[str, Any]) -> None:
    loaded["memory"]["code_bytes"] -= 1


def more_kept(loaded: dict[str, Any]) -> None:
    loaded["memory"]["kept_weights"] += 1


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
    manifest: dict[str, Any],
    loaded: dict[str, Any],
    change: Callable[[dict[str, Any]], None],
    name: str,
    words: str,
) -> None:
    change(loaded)
    found = failed(reload_gates(manifest, loaded))
    assert list(found) == [name]
    assert words in found[name]


@pytest.fixture
def blocks(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What a comparison finds if every layer is as the manifest promises."""
    found = []
    for number in range(2):
        prefix = f"transformer.h.{number}."
        modules = [
            {
                "name": tensor["module"].removeprefix(prefix),
                "relative_error": 0.1,
                "weight_error": tensor["relative_rmse"],
                "worst": 0.13,
                "worst_at": 3,
            }
            for tensor in manifest["tensors"]
            if tensor["quantized"] and tensor["module"].startswith(prefix)
        ]
        found.append({"name": prefix[:-1], "relative_error": 0.1, "modules": modules})
    return found


def module_of(blocks: list[dict[str, Any]], number: int, name: str) -> dict[str, Any]:
    (found,) = (m for m in blocks[number]["modules"] if m["name"] == name)
    assert isinstance(found, dict)
    return found


def test_good_weights(manifest: dict[str, Any], blocks: list[dict[str, Any]]) -> None:
    check = weights_gate(manifest, blocks, [])
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
    manifest: dict[str, Any], blocks: list[dict[str, Any]], change: dict[str, Any], words: str
) -> None:
    module_of(blocks, 0, "mlp.dense_h_to_4h").update(change)
    check = weights_gate(manifest, blocks, [])
    assert not check.passed
    assert words in check.found
    assert ";" not in check.found  # and no other


def test_the_worst_layers_come_first_and_no_more_than_three(
    manifest: dict[str, Any], blocks: list[dict[str, Any]]
) -> None:
    for number, block in enumerate(blocks):
        for place, module in enumerate(block["modules"]):
            module["worst"] = 1 + number + place / 10
    module_of(blocks, 0, "self_attention.dense")["worst"] = None
    check = weights_gate(manifest, blocks, [])
    first, *others = check.found.split("; ")
    assert first == "transformer.h.0.self_attention.dense is not finite"
    assert len(others) == 2
    assert all(words.startswith("transformer.h.1.") for words in others)
    assert others[-1].endswith(" and 5 more")


def test_a_layer_that_should_not_be_4_bit_is_left_to_the_gate_on_modules(
    manifest: dict[str, Any], blocks: list[dict[str, Any]]
) -> None:
    """The manifest says that it is kept in 16 bit, and it came back in 4."""
    honest = copy.deepcopy(manifest)
    (entry,) = (tensor for tensor in honest["tensors"] if tensor.get("module") == UP)
    entry["quantized"] = False
    assert weights_gate(honest, blocks, []).passed


def test_a_layer_that_was_not_compared_is_named(
    manifest: dict[str, Any], blocks: list[dict[str, Any]]
) -> None:
    """Such as the projections that OPT has outside its blocks."""
    blocks[0]["modules"].remove(module_of(blocks, 0, "mlp.dense_h_to_4h"))
    check = weights_gate(manifest, blocks, [])
    assert not check.passed
    assert UP in check.found


CALIBRATED: Final = {"quantize": {"rounding": "calibrated"}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"worst": 1.4, "worst_at": 0}, None),
        ({"worst": 1.6}, f"{UP} has an error of 160% of the largest of 64 weights, at weights 192"),
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
    manifest: dict[str, Any],
    blocks: list[dict[str, Any]],
    change: dict[str, Any],
    words: str | None,
) -> None:
    module_of(blocks, 0, "mlp.dense_h_to_4h").update(change)
    check = weights_gate({**manifest, "recipe": CALIBRATED}, blocks, [])
    assert check.passed is (words is None)
    assert (words or "8 layers") in check.found
    assert check.expected.startswith("at most 150%, no scale beyond 2 times the largest of its 64")


def test_the_scales_of_nearest_may_reach_as_far_as_they_are_stored(
    manifest: dict[str, Any], blocks: list[dict[str, Any]]
) -> None:
    """Blocks of near-zeros get any small scale."""
    module_of(blocks, 0, "mlp.dense_h_to_4h").update({"reach": 9.0, "reach_at": 4})
    assert weights_gate(manifest, blocks, []).passed
