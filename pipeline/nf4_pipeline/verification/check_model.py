"""What came back from disk in a fresh process: every layer against manifest and source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Final

import numpy as np

from nf4_pipeline.fidelity.verdict import Check
from nf4_pipeline.gptq.scale_limits import REACH
from nf4_pipeline.manifest.manifest import Manifest
from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.codebook import SCALE_LEVELS
from nf4_pipeline.verification.document import BlockError, LayerError
from nf4_pipeline.verification.messages import ArtifactReply, LoadedModel


@dataclass(frozen=True)
class _Bounds:
    """How far weights and scales may be from the source, as each way of rounding can make them.

    Attributes:
        error: of a weight, as a share of the largest of its 64; None if the scales' bound says it.
        scale: of a scale, as a share of its nested scale; None if scales are chosen freely.
        reach: of a scale without its sign, as a share of the largest of its 64 weights; None if
            the bound on its error says enough.
        words: all of it.
    """

    error: float | None
    scale: float | None
    reach: float | None
    words: str


_BOUNDS: Final = {
    # Half of the widest gap between levels is 0.152, and a scale that was itself rounded coarsely
    # can add as much again; codes in another order, or of another layer, are off by more than the
    # whole. A scale is off by half of the widest gap between its levels, and a little for float32.
    "nearest": _Bounds(
        error=0.5,
        scale=1.02 * float(np.diff(SCALE_LEVELS).max()) / 2,
        reach=None,
        words="at most 50%, every scale as near as it can be stored",
    ),
    # A code makes up for the errors of those before it, so a weight may be anything that its scale
    # allows, and the scale was chosen within a bound. The rest is for a model that computes in
    # bfloat16 what its checkpoint holds in float32: the bound was that of rounded weights.
    "calibrated": _Bounds(
        error=None,
        scale=None,
        reach=1.01 * REACH,
        words=f"no scale beyond {REACH:g} times the largest of its 64 weights",
    ),
}
_UNRELATED: Final = 0.95
"""Relative error of a layer: codes that have nothing to do with its weights come to 1 and more."""
_SAME_ERROR: Final = 0.001
"""Share by which a layer's error may differ from that in the manifest, which has four digits."""
_ROUNDING: Final = 1e-4  # of weights that are nearly exact


def report_unloadable(error: str) -> Check:
    """The check that fails if no loader takes the artifact.

    Args:
        error: why.
    """
    return Check("the artifact loads", False, error, "a model on the device")


def check_reloaded(manifest: Manifest, reply: ArtifactReply) -> list[Check]:
    """What a fresh process loaded, against the manifest."""
    return [
        _check_modules(manifest, reply.memory.linear4bit),
        _check_names(reply.missing, reply.unexpected),
        _check_memory(manifest, reply.memory),
    ]


def _check_modules(manifest: Manifest, linear4bit: Sequence[str]) -> Check:
    expected = manifest.quantized_modules
    missing = sorted(expected - set(linear4bit))
    extra = sorted(set(linear4bit) - expected)
    problems = [f"{name} is not Linear4bit" for name in missing[:3]]
    problems += [f"{name} is Linear4bit and should not be" for name in extra[:3]]
    return Check(
        "Linear4bit modules after reloading",
        not missing and not extra,
        "; ".join(problems) if problems else f"{len(linear4bit)} modules",
        f"{len(expected)} modules",
    )


def _check_names(missing: Sequence[str], unexpected: Sequence[str]) -> Check:
    problems = [
        f"{len(names)} {what}, such as {names[0]}"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    return Check(
        "names that the loader looked for",
        not problems,
        "; ".join(problems) or "none missing, none unexpected",
        "none missing, none unexpected",
    )


def _check_memory(manifest: Manifest, memory: LoadedModel) -> Check:
    """What is in memory, in bytes of codes and in weights that are not 4 bit (however cast)."""
    code_bytes = sum(
        part.bytes
        for tensor in manifest.tensors
        if tensor.quantized
        for part in tensor.stored
        if part.name == tensor.name
    )
    kept_weights = sum(prod(tensor.shape) for tensor in manifest.tensors if not tensor.quantized)
    loaded, expected = (memory.code_bytes, memory.kept_weights), (code_bytes, kept_weights)
    words = "{:,} bytes of codes, {:,} weights beside them"
    return Check(
        "what is in memory", loaded == expected, words.format(*loaded), words.format(*expected)
    )


def check_weights(
    manifest: Manifest,
    blocks: Sequence[BlockError],
    outside: Sequence[LayerError],
    malformed: Sequence[str] = (),
) -> Check:
    """Every 4-bit weight in the artifact's files, against the 16-bit weight of the source.

    Whatever the manifest says of itself, codes of another layer, or all in another order, are far
    from what they stand for, and so is a scale beyond its bound. A few wrong codes are seen by the
    error that the manifest promises for their layer.

    Args:
        manifest: of the artifact; what its rounding can do is not held against it, nor what that
            to nearest can where a layer was rounded so after all.
        blocks: errors of the layers in each block.
        outside: of those that no block holds.
        malformed: weights that cannot be decoded as the format says, each with why.
    """
    promised = {
        tensor.module: (tensor.relative_rmse, _bounds_of(manifest, tensor.name))
        for tensor in manifest.tensors
        if tensor.module is not None and tensor.quantized and tensor.relative_rmse is not None
    }
    compared = {layer.name: layer for layer in outside}
    for block in blocks:
        compared |= {f"{block.name}.{layer.name}": layer for layer in block.modules}
    problems = [(inf, f"{name} was not compared") for name in promised.keys() - compared.keys()]
    problems += [(inf, problem) for problem in malformed]
    common = {name: compared[name] for name in promised if name in compared}
    for name, layer in common.items():
        problem = _find_problem(layer, *promised[name])
        if problem:
            problems.append((problem[0], f"{name} {problem[1]}"))
    worst_first = [text for _, text in sorted(problems, reverse=True)]
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return Check(
        "weights near those of the source",
        not problems,
        "; ".join(worst_first[:3]) + more
        if problems
        else _farthest([(layer, promised[name][1]) for name, layer in common.items()]),
        f"{_BOUNDS[manifest.rounding].words}, and each layer as in the manifest",
    )


def _farthest(layers: Sequence[tuple[LayerError, _Bounds]]) -> str:
    """What comes nearest to the bounds, in words."""
    worst = max((layer.worst or 0.0 for layer, _ in layers), default=0.0)
    said = (
        f"{len(layers)} layers; no weight is off by more than {worst:.1%} of the largest of its 64"
    )
    reach = [layer.reach or 0.0 for layer, bounds in layers if bounds.reach is not None]
    return f"{said}, no scale beyond {max(reach):.2f} times that" if reach else said


def _bounds_of(manifest: Manifest, weight: str) -> _Bounds:
    calibration = manifest.calibration
    fell_back = calibration is not None and weight in calibration.fallbacks
    return _BOUNDS["nearest" if fell_back else manifest.rounding]


def _find_problem(layer: LayerError, promised: float, bounds: _Bounds) -> tuple[float, str] | None:
    """How bad a weight is, and in what way; None if it is what it should be."""
    if layer.weight_error is None or layer.worst is None:
        return inf, "is not finite"
    if bounds.error is not None and layer.worst > bounds.error:
        where = _weights(layer.worst_at)
        return (
            layer.worst,
            f"has an error of {layer.worst:.0%} of the largest of 64 weights, at {where}",
        )
    for share, at, bound, words in (
        (layer.scale, layer.scale_at, bounds.scale, "is off by {:.1%} of its nested scale"),
        (layer.reach, layer.reach_at, bounds.reach, "is {:.0%} of the largest of its 64 weights"),
    ):
        if bound is None:
            continue
        if share is None or share > bound:
            said = "is not finite" if share is None else words.format(share)
            return inf, f"has a scale that {said}, at {_weights(at)}"
    if layer.weight_error > _UNRELATED:
        return layer.weight_error, f"is off by {layer.weight_error:.0%} of its weights"
    if abs(layer.weight_error - promised) > _SAME_ERROR * promised + _ROUNDING:
        return (
            layer.weight_error,
            f"is off by {layer.weight_error:.4f}, not by {promised:.4f} as promised",
        )
    return None


def _weights(block: int) -> str:
    return f"weights {block * BLOCK_SIZE:,} and on"


def check_kept(count: int, changed: Sequence[str]) -> Check:
    """What is not 4 bit, against the source.

    Args:
        count: tensors that were compared.
        changed: the names of those that differ.
    """
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return Check(
        "what stays in 16 bit equals the source",
        not changed,
        "different: " + ", ".join(changed[:3]) + more
        if changed
        else f"{count} parameters, all equal",
        f"{count} parameters, all equal",
    )
