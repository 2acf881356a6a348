"""Plan and digests -> manifest. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.manifest.manifest import (
    SCHEMA_VERSION,
    CalibrationSummary,
    DroppedTensor,
    Manifest,
    Source,
    StoredTensorEntry,
    Tensor,
    TensorCounts,
    Totals,
    format_name,
)
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.selection import Plan, TensorPlan


def build_manifest(
    *,
    source: Source,
    recipe: Recipe,
    plan: Plan,
    stored: Mapping[str, StoredTensorEntry],
    relative_rmse: Mapping[str, float],
    files: Mapping[str, FileDigest],
    model_class: str,
    calibration: CalibrationSummary | None = None,
) -> Manifest:
    """Puts the manifest together.

    Args:
        source: the checkpoint.
        recipe: what was asked for; the part that shapes the artifact goes in.
        plan: what happened to each tensor.
        stored: what stands in the artifact's files, by name.
        relative_rmse: of each quantized weight, by name.
        files: every file that serialize wrote besides the manifest.
        model_class: the causal LM class.
        calibration: how codes and scales were chosen, if not by rounding to nearest.
    """
    tables = recipe.as_json()
    tensors = [_tensor(t, stored, relative_rmse) for t in plan.tensors if t.action != "drop"]
    return Manifest(
        schema_version=SCHEMA_VERSION,
        format=format_name(plan.quant_type),
        model_class=model_class,
        source=replace(source, files=dict(sorted(source.files.items()))),
        recipe={name: tables[name] for name in ("quantize", "serialize")},
        totals=totals(plan),
        files=dict(sorted(files.items())),
        skip_modules=plan.skip_modules,
        hidden_modules=plan.hidden_modules,
        tensors=tuple(sorted(tensors, key=lambda tensor: tensor.name)),
        dropped=tuple(
            DroppedTensor(
                name=tensor.source.name,
                dtype=tensor.source.header.dtype,
                shape=tensor.source.header.shape,
                bytes=tensor.source.header.nbytes,
                reason=tensor.reason,
            )
            for tensor in plan.by_action("drop")
        ),
        calibration=calibration,
    )


def _tensor(
    tensor: TensorPlan,
    stored: Mapping[str, StoredTensorEntry],
    relative_rmse: Mapping[str, float],
) -> Tensor:
    header = tensor.source.header
    quantized = tensor.action == "quantize"
    parts = tuple(stored[part.name] for part in tensor.stored)
    return Tensor(
        name=tensor.name,
        quantized=quantized,
        reason=tensor.reason,
        shape=tensor.shape,
        dtype=header.dtype,
        source_name=tensor.source.name,
        source_bytes=header.nbytes,
        bytes=sum(part.bytes for part in parts),
        stored=parts,
        module=tensor.module,
        transposed=tensor.transposed if quantized else None,
        relative_rmse=relative_rmse[tensor.name] if quantized else None,
    )


def totals(plan: Plan) -> Totals:
    """Sizes and counts over a whole plan."""
    quantized, kept, dropped = (plan.by_action(a) for a in ("quantize", "keep", "drop"))
    original = sum(tensor.source.header.nbytes for tensor in plan.tensors)
    quantized_bytes = sum(part.nbytes for tensor in quantized for part in tensor.stored)
    kept_bytes = sum(part.nbytes for tensor in kept for part in tensor.stored)
    quantized_weights = sum(prod(tensor.shape) for tensor in quantized)
    weights = quantized_weights + sum(prod(tensor.shape) for tensor in kept)
    artifact = quantized_bytes + kept_bytes
    return Totals(
        original_bytes=original,
        artifact_bytes=artifact,
        quantized_bytes=quantized_bytes,
        kept_bytes=kept_bytes,
        dropped_bytes=sum(tensor.source.header.nbytes for tensor in dropped),
        ratio=round(artifact / original, 6),
        weights=weights,
        quantized_weights=quantized_weights,
        bits_per_weight=round(8 * artifact / weights, 6),
        bits_per_quantized_weight=round(8 * quantized_bytes / quantized_weights, 6),
        tensors=TensorCounts(quantized=len(quantized), kept=len(kept), dropped=len(dropped)),
        kept_bytes_by_reason=_bytes_by_reason(kept),
    )


def _bytes_by_reason(tensors: tuple[TensorPlan, ...]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for tensor in tensors:
        nbytes = sum(part.nbytes for part in tensor.stored)
        sums[tensor.reason] = sums.get(tensor.reason, 0) + nbytes
    return dict(sorted(sums.items()))
