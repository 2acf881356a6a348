"""The report: it fits its schema, its sums add up, and what fails is told."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Final

import jsonschema
import numpy as np
import pytest
from nf4_pipeline.fidelity.metrics import by_domain, by_position, compare, histogram
from nf4_pipeline.fidelity.token_scores import TokenScores
from nf4_pipeline.fidelity.verdict import Check
from nf4_pipeline.recipe import VerifyRecipe
from nf4_pipeline.verification.document import SCHEMA, SCHEMA_VERSION, examined, refused
from nf4_pipeline.verification.prompts import Prompt

GATE: Final = Check("files as in the manifest", True, "6 files hash right", "6 files")
VERSIONS: Final = {"nf4-pipeline": "0.1.0", "torch": "2.13.0"}
LENGTHS: Final = [60, 40, 28]
PROMPTS: Final = (
    Prompt("Tell me."),
    Prompt("1 + 1 =", expect="2"),
    Prompt("2 + 2 =", expect="4"),
    Prompt("3 + 3 =", expect="6"),
)


@pytest.fixture(scope="module")
def manifest(exported_falcon: Path) -> dict[str, Any]:
    path = exported_falcon / "export" / "manifest.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def scores(kl: float = 0.02) -> TokenScores:
    count = sum(LENGTHS)
    dice = np.random.default_rng(0)
    return TokenScores(
        kl=dice.exponential(kl, count),
        agrees=dice.random(count) < 0.95,
        sure=np.ones(count, np.bool_),
        reference_nll=np.full(count, 2.0),
        nll=np.full(count, 2.01),
    )


def said(text: str, *ids: int) -> dict[str, Any]:
    return {"text": text, "ids": list(ids), "seconds": 1.0, "first_token_seconds": 0.1}


def costs(**changes: Any) -> dict[str, Any]:
    return {
        "load_seconds": 1.5,
        "tokens_per_second": 30.0,
        "first_token_seconds": 0.05,
        "footprint_bytes": 76_736,
        "peak_memory_bytes": 1_000_000,
        "peak_device_memory_bytes": 0,
        "streamed": False,
    } | changes


def source(*answers: dict[str, Any]) -> dict[str, Any]:
    """What the worker says of the 16-bit model."""
    return {"answers": list(answers), "costs": costs(footprint_bytes=205_696)}


def artifact(
    manifest: dict[str, Any], *answers: dict[str, Any], found: TokenScores | None = None
) -> dict[str, Any]:
    """What it says of the 4-bit one, if all is well."""
    some = found or scores()
    quantized = [tensor for tensor in manifest["tensors"] if tensor["quantized"]]
    kept = [tensor for tensor in manifest["tensors"] if not tensor["quantized"]]
    return {
        "device": {"kind": "cpu", "name": "some CPU, 2 cores", "dtype": "bfloat16"},
        "missing": [],
        "unexpected": [],
        "memory": {
            "linear4bit": [tensor["module"] for tensor in quantized],
            "code_bytes": sum(np.prod(tensor["shape"]).item() // 2 for tensor in quantized),
            "kept_weights": sum(np.prod(tensor["shape"]).item() for tensor in kept),
        },
        "text": {"name": "a", "sha256": None, "sequences": 3, "tokens": len(some), "length": 61},
        "fidelity": compare(some, LENGTHS).as_json(),
        "domains": by_domain(some, LENGTHS, ["a", "b", "a"]),
        "kl_by_position": by_position(some, LENGTHS),
        "kl_histogram": histogram(some),
        "outside": [],
        "kept": 7,
        "changed": [],
        "blocks": [
            {
                "name": name,
                "relative_error": 0.1,
                "modules": [
                    {
                        "name": tensor["module"].removeprefix(f"{name}."),
                        "relative_error": 0.09,
                        "weight_error": tensor["relative_rmse"],
                        "worst": 0.12,
                        "worst_at": 0,
                    }
                    for tensor in quantized
                    if tensor["module"].startswith(f"{name}.")
                ],
            }
            for name in ("transformer.h.0", "transformer.h.1")
        ],
        "comparison": {
            "seconds": 3.0,
            "peak_memory_bytes": 2_000_000,
            "peak_device_memory_bytes": 0,
        },
        "answers": list(answers),
        "costs": costs(),
    }


RIGHT: Final = (said("Yes", 1), said("Yes", 1), said(" 2", 2), said("4", 4), said("6", 6))


def report(
    manifest: dict[str, Any],
    before: tuple[dict[str, Any], ...] = RIGHT,
    after: tuple[dict[str, Any], ...] = RIGHT,
    **changes: Any,
) -> dict[str, Any]:
    found = examined(
        manifest,
        [GATE],
        PROMPTS,
        source(*before),
        artifact(manifest, *after) | changes,
        VerifyRecipe(),
        VERSIONS,
    )
    written: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
    jsonschema.validate(written, json.loads(SCHEMA.read_text("utf-8")))
    return written


def failed(found: dict[str, Any]) -> list[str]:
    return [check["name"] for check in found["checks"] if not check["passed"]]


def test_the_schema_is_one() -> None:
    schema = json.loads(SCHEMA.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema_version"]["const"] == SCHEMA_VERSION


def test_a_good_report(manifest: dict[str, Any]) -> None:
    found = report(manifest)
    assert (found["verdict"], failed(found)) == ("pass", [])
    assert found["checks"][0] == GATE.as_json()  # gates first
    assert [check["name"] for check in found["checks"][1:]] == [
        "Linear4bit modules after reloading",
        "names that the loader looked for",
        "what is in memory",
        "weights near those of the source",
        "what stays in 16 bit equals the source",
        "mean KL from the 16-bit model",
        "same next token where the 16-bit model is sure",
        "perplexity in 4 bit over 16 bit",
        "right answers",
    ]
    assert found["thresholds"] == {
        "max_mean_kl": 0.5,
        "min_sure_agreement": 0.8,
        "max_perplexity_ratio": 1.5,
        "max_accuracy_drop": 0.1,
    }
    assert found["versions"] == VERSIONS
    assert found["models"]["16bit"]["footprint_bytes"] == 205_696
    assert found["models"]["4bit"]["footprint_bytes"] == 76_736


def test_sizes_add_up(manifest: dict[str, Any]) -> None:
    sizes = report(manifest)["sizes"]
    totals = manifest["totals"]
    assert sum(group["before"] for group in sizes["groups"]) == sizes["original_bytes"]
    assert sum(group["after"] for group in sizes["groups"]) == sizes["artifact_bytes"]
    quantized = [group for group in sizes["groups"] if group["quantized"]]
    assert sum(group["after"] for group in quantized) == sizes["quantized_bytes"]
    kept = sum(group["after"] for group in sizes["groups"] if not group["quantized"])
    assert kept == sizes["kept_bytes"] == sum(sizes["kept_bytes_by_reason"].values())
    gone = [group for group in sizes["groups"] if not group["after"]]
    assert sum(group["before"] for group in gone) == sizes["dropped_bytes"]
    assert sizes["disk_bytes"] == sum(file["size"] for file in manifest["files"].values())
    assert sizes["footprint_bytes"] == 76_736
    assert sizes["layers"] == totals["tensors"]["quantized"] == 8
    names = [group["name"] for group in sizes["groups"]]
    assert "transformer.h.*.mlp.dense_h_to_4h.weight" in names
    assert len(set(names)) == len(names)
    before = [group["before"] for group in sizes["groups"]]
    assert before == sorted(before, reverse=True)


def test_layers_of_one_name_of_which_some_are_skipped(manifest: dict[str, Any]) -> None:
    """With skip_modules one of two layers stays in 16 bit: the group must not claim both."""
    mixed = copy.deepcopy(manifest)
    (entry,) = (
        tensor
        for tensor in mixed["tensors"]
        if tensor["name"] == "transformer.h.1.self_attention.dense.weight"
    )
    mixed["totals"]["quantized_bytes"] -= entry["bytes"]
    mixed["totals"]["kept_bytes"] += entry["source_bytes"]
    entry |= {"quantized": False, "bytes": entry["source_bytes"]}
    found = examined(
        mixed, [GATE], PROMPTS, source(*RIGHT), artifact(mixed, *RIGHT), VerifyRecipe(), VERSIONS
    )
    sizes = found["sizes"]
    for flag, total in ((True, "quantized_bytes"), (False, "kept_bytes")):
        after = sum(group["after"] for group in sizes["groups"] if group["quantized"] is flag)
        assert after == sizes[total]


def test_answers_stand_side_by_side(manifest: dict[str, Any]) -> None:
    after = (said("Yes", 1), said("Yes, no", 1, 7), said("2.", 2), said("5", 5), said("6", 6))
    answers = report(manifest, after=after)["answers"]
    assert [(a["prompt"], a["seed"]) for a in answers] == [
        ("Tell me.", None),
        ("Tell me.", 0),
        ("1 + 1 =", None),
        ("2 + 2 =", None),
        ("3 + 3 =", None),
    ]
    greedy, drawn, two, four, six = answers
    assert (greedy["same"], greedy["first_difference"]) == (True, None)
    assert (drawn["same"], drawn["first_difference"]) == (False, {"token": 1, "character": 3})
    assert (drawn["answer_16bit"], drawn["answer_4bit"]) == ("Yes", "Yes, no")
    assert "right_4bit" not in greedy
    assert (two["same"], two["right_16bit"], two["right_4bit"]) == (False, True, True)
    assert (four["right_16bit"], four["right_4bit"]) == (True, False)
    assert (six["expect"], six["right_16bit"], six["right_4bit"]) == ("6", True, True)


def test_too_many_right_answers_lost(manifest: dict[str, Any]) -> None:
    after = (*RIGHT[:2], said("2", 2), said("5", 5), said("6", 6))
    found = report(manifest, after=after)
    assert found["accuracy"] == {"asked": 3, "right_16bit": 3, "right_4bit": 2}
    assert (found["verdict"], failed(found)) == ("fail", ["right answers"])
    # What the 16-bit model does not know either is not lost.
    assert report(manifest, before=after, after=after)["verdict"] == "pass"


def test_no_prompts(manifest: dict[str, Any]) -> None:
    found = examined(manifest, [GATE], (), source(), artifact(manifest), VerifyRecipe(), VERSIONS)
    jsonschema.validate(found, json.loads(SCHEMA.read_text("utf-8")))
    assert (found["accuracy"], found["answers"], found["verdict"]) == (None, [], "pass")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_gives_no_numbers_fails(manifest: dict[str, Any], bad: float) -> None:
    spoiled = scores()
    spoiled.kl[5] = spoiled.nll[5] = bad
    part = artifact(manifest, *RIGHT, found=spoiled)
    blocks = copy.deepcopy(part["blocks"])
    blocks[1]["relative_error"] = None
    blocks[1]["modules"][0] |= {"relative_error": None, "weight_error": None, "worst": None}
    changes = {name: part[name] for name in ("fidelity", "domains", "kl_by_position")}
    found = report(
        manifest, **changes, kl_histogram=part["kl_histogram"], blocks=blocks
    )  # valid JSON, or this fails
    assert found["verdict"] == "fail"
    assert found["fidelity"]["mean_kl"]["value"] is None
    assert failed(found) == [
        "weights near those of the source",
        "mean KL from the 16-bit model",
        "perplexity in 4 bit over 16 bit",
    ]


def test_a_refused_artifact() -> None:
    bad = Check("files as in the manifest", False, "x is missing", "6 files")
    found = refused([bad], VerifyRecipe(), VERSIONS)
    jsonschema.validate(found, json.loads(SCHEMA.read_text("utf-8")))
    assert found["verdict"] == "fail"
    assert set(found) == {"schema_version", "verdict", "thresholds", "checks", "versions"}


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "maybe"},
        {"schema_version": 1},
        {"checks": []},
        {"surprise": 1},
        {"fidelity": {"mean_kl": 0.1}},
        {"accuracy": {"asked": 3}},
    ],
)
def test_the_schema_refuses(manifest: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report(manifest) | change, json.loads(SCHEMA.read_text("utf-8")))


@pytest.mark.parametrize("part", ["device", "sizes", "blocks", "models", "answers", "accuracy"])
def test_nothing_is_left_out_beside_a_fidelity(manifest: dict[str, Any], part: str) -> None:
    found = report(manifest)
    del found[part]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, json.loads(SCHEMA.read_text("utf-8")))
