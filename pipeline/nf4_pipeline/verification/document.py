"""What was found -> verification.json. Pure; its JSON Schema stands beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.fidelity.metrics import Fidelity, is_right
from nf4_pipeline.fidelity.verdict import Check, accuracy_check, fidelity_checks, verdict
from nf4_pipeline.recipe import VerifyRecipe
from nf4_pipeline.verification.checks import kept_gate, reload_gates, weights_gate
from nf4_pipeline.verification.generation import first_difference, questions
from nf4_pipeline.verification.prompts import Prompt

SCHEMA_VERSION: Final = 3
SCHEMA: Final = Path(__file__).with_name("verification.schema.json")
_MEASURED: Final = ("text", "fidelity", "domains", "kl_by_position", "kl_histogram", "nearest")


def refused(
    checks: Sequence[Check], recipe: VerifyRecipe, versions: Mapping[str, str]
) -> dict[str, Any]:
    """The report on an artifact that did not come as far as being compared.

    Args:
        checks: what was checked; one of them failed.
        recipe: its limits.
        versions: of what was used, by name.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": verdict(checks),
        "thresholds": {
            "max_mean_kl": recipe.max_mean_kl,
            "min_sure_agreement": recipe.min_sure_agreement,
            "max_perplexity_ratio": recipe.max_perplexity_ratio,
            "max_accuracy_drop": recipe.max_accuracy_drop,
        },
        "checks": [check.as_json() for check in checks],
        "versions": dict(versions),
    }


def examined(
    manifest: Mapping[str, Any],
    gates: Sequence[Check],
    prompts: Sequence[Prompt],
    source: Mapping[str, Any],
    artifact: Mapping[str, Any],
    recipe: VerifyRecipe,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The report on an artifact that was held against its source.

    Args:
        manifest: of the artifact.
        gates: checks of its files, all passed.
        prompts: that both models were asked.
        source: what the worker found of the 16-bit model.
        artifact: what it found of the 4-bit one.
        recipe: the limits.
        versions: of what was used, by name.
    """
    answers = _side_by_side(prompts, source["answers"], artifact["answers"])
    asked = [a for a in answers if a["expect"] is not None]
    checks = [
        *gates,
        *reload_gates(dict(manifest), dict(artifact)),
        weights_gate(dict(manifest), artifact["blocks"], artifact["outside"]),
        kept_gate(artifact["kept"], artifact["changed"]),
        *fidelity_checks(Fidelity.from_json(artifact["fidelity"]), recipe),
    ]
    accuracy = accuracy_check(
        [a["right_16bit"] for a in asked], [a["right_4bit"] for a in asked], recipe
    )
    checks += [accuracy] if accuracy else []
    return {
        **refused(checks, recipe, versions),
        "device": artifact["device"],
        "sizes": _sizes(manifest, artifact["costs"]["footprint_bytes"]),
        **{name: artifact[name] for name in _MEASURED if name in artifact},
        "blocks": artifact["blocks"],
        "outside": artifact["outside"],
        "accuracy": _accuracy(asked),
        "models": {"16bit": source["costs"], "4bit": artifact["costs"]},
        "comparison": artifact["comparison"],
        "answers": answers,
    }


def _side_by_side(
    prompts: Sequence[Prompt], before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    answers = []
    for question, one, other in zip(questions(prompts), before, after, strict=True):
        prompt = question.prompt
        entry: dict[str, Any] = {
            "prompt": prompt.prompt,
            "expect": prompt.expect,
            "seed": question.seed,
            "answer_16bit": one["text"],
            "answer_4bit": other["text"],
            "same": one["text"] == other["text"],
            "first_difference": first_difference(one, other),
        }
        if prompt.expect is not None:
            entry["right_16bit"] = is_right(one["text"], prompt.expect)
            entry["right_4bit"] = is_right(other["text"], prompt.expect)
        answers.append(entry)
    return answers


def _accuracy(asked: Sequence[dict[str, Any]]) -> dict[str, int] | None:
    if not asked:
        return None
    return {
        "asked": len(asked),
        "right_16bit": sum(answer["right_16bit"] for answer in asked),
        "right_4bit": sum(answer["right_4bit"] for answer in asked),
    }


def _sizes(manifest: Mapping[str, Any], footprint: int) -> dict[str, Any]:
    totals = manifest["totals"]
    names = (
        "original_bytes",
        "artifact_bytes",
        "quantized_bytes",
        "kept_bytes",
        "dropped_bytes",
        "ratio",
        "bits_per_weight",
        "bits_per_quantized_weight",
        "kept_bytes_by_reason",
    )
    return {
        **{name: totals[name] for name in names},
        "layers": totals["tensors"]["quantized"],
        "disk_bytes": sum(entry["size"] for entry in manifest["files"].values()),
        "footprint_bytes": footprint,
        "groups": _groups(manifest),
    }


def _groups(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tensors that differ only in the number of their layer, together; the largest first.

    If a recipe skips some of them, those that are quantized and those that are not are two groups.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    entries = [
        (t["name"], t["source_bytes"], t["bytes"], t["quantized"]) for t in manifest["tensors"]
    ]
    entries += [(t["name"], t["bytes"], 0, False) for t in manifest["dropped"]]
    for name, before, after, quantized in entries:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        group = groups.setdefault(
            (pattern, quantized), {"name": pattern, "before": 0, "after": 0, "quantized": quantized}
        )
        group["before"] += before
        group["after"] += after
    return sorted(groups.values(), key=lambda g: (-g["before"], g["name"]))
