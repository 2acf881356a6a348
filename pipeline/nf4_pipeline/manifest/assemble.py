"""Plan and digests -> manifest. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Final

from nf4_pipeline.checkpoint.digest import FileDigest, digests_json
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.selection import Plan, TensorPlan

SCHEMA_VERSION: Final = 1
OF_THE_MACHINE: Final = frozenset({"seconds", "peak_device_memory_bytes"})
"""Facts of a calibration that are not the same each time."""


def build_manifest(
    *,
    source: Mapping[str, Any],
    source_files: Mapping[str, FileDigest],
    recipe: Recipe,
    plan: Plan,
    stored: Mapping[str, Mapping[str, Any]],
    relative_rmse: Mapping[str, float],
    files: Mapping[str, FileDigest],
    model_class: str,
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Puts the manifest together.

    Args:
        source: repo, commit (or None) and content hash of the checkpoint.
        source_files: every file that was taken from it.
        recipe: what was asked for; the part that shapes the artifact goes in.
        plan: what happened to each tensor.
        stored: stored tensor name -> {"file", "dtype", "shape", "bytes", "sha256"}.
        relative_rmse: of each quantized weight, by name.
        files: every file that serialize wrote besides the manifest.
        model_class: the causal LM class.
        calibration: how codes and scales were chosen, if not by rounding to nearest.
    """
    tensors = [_tensor(t, stored, relative_rmse) for t in plan.tensors if t.action != "drop"]
    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "format": "bitsandbytes NF4, block 64, double quantization in blocks of 256",
        "model_class": model_class,
        "source": {**source, "files": digests_json(source_files)},
        "recipe": {
            "quantize": recipe.as_json()["quantize"],
            "serialize": recipe.as_json()["serialize"],
        },
        "totals": totals(plan, stored),
        "files": digests_json(files),
        "skip_modules": list(plan.skip_modules),
        "hidden_modules": list(plan.hidden_modules),
        "tensors": sorted(tensors, key=lambda tensor: str(tensor["name"])),
        "dropped": [
            {
                "name": tensor.source.name,
                "dtype": tensor.source.header.dtype,
                "shape": list(tensor.source.header.shape),
                "bytes": tensor.source.header.nbytes,
                "reason": tensor.reason,
            }
            for tensor in plan.by_action("drop")
        ],
    }
    if calibration is not None:
        manifest["calibration"] = shown(calibration)
    return manifest


def shown(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of calibration: all but what the machine had to do with it."""
    return {name: value for name, value in calibration.items() if name not in OF_THE_MACHINE}


def _tensor(
    tensor: TensorPlan,
    stored: Mapping[str, Mapping[str, Any]],
    relative_rmse: Mapping[str, float],
) -> dict[str, Any]:
    header = tensor.source.header
    entry: dict[str, Any] = {
        "name": tensor.name,
        "quantized": tensor.action == "quantize",
        "reason": tensor.reason,
        "shape": list(tensor.shape),
        "dtype": header.dtype,
        "source_name": tensor.source.name,
        "source_bytes": header.nbytes,
        "bytes": sum(stored[part.name]["bytes"] for part in tensor.stored),
        "stored": [{"name": part.name, **stored[part.name]} for part in tensor.stored],
    }
    if tensor.module is not None:
        entry["module"] = tensor.module
    if tensor.action == "quantize":
        entry["transposed"] = tensor.transposed
        entry["relative_rmse"] = relative_rmse[tensor.name]
    return entry


def totals(plan: Plan, stored: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sizes and counts. "Original" is every tensor of the source, tied twins included."""
    quantized = plan.quantized
    kept = plan.by_action("keep")
    original = sum(tensor.source.header.nbytes for tensor in plan.tensors)
    quantized_bytes = sum(stored[p.name]["bytes"] for t in quantized for p in t.stored)
    kept_bytes = sum(tensor.source.header.nbytes for tensor in kept)
    quantized_weights = sum(prod(tensor.shape) for tensor in quantized)
    weights = quantized_weights + sum(prod(tensor.shape) for tensor in kept)
    artifact = quantized_bytes + kept_bytes
    return {
        "original_bytes": original,
        "artifact_bytes": artifact,
        "quantized_bytes": quantized_bytes,
        "kept_bytes": kept_bytes,
        "dropped_bytes": sum(t.source.header.nbytes for t in plan.by_action("drop")),
        "ratio": round(artifact / original, 6),
        "weights": weights,
        "quantized_weights": quantized_weights,
        "bits_per_weight": round(8 * artifact / weights, 6),
        "bits_per_quantized_weight": round(8 * quantized_bytes / quantized_weights, 6),
        "tensors": {
            "quantized": len(quantized),
            "kept": len(kept),
            "dropped": len(plan.by_action("drop")),
        },
        "kept_bytes_by_reason": _by_reason(plan),
    }


def _by_reason(plan: Plan) -> dict[str, int]:
    sums: dict[str, int] = {}
    for tensor in plan.by_action("keep"):
        sums[tensor.reason] = sums.get(tensor.reason, 0) + tensor.source.header.nbytes
    return dict(sorted(sums.items()))
