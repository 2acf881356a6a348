"""Every file, every stored tensor and every reloaded layer of an artifact against its manifest."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from nf4_pipeline.checkpoint.digest import FileDigest, digest_file, digest_tensors
from nf4_pipeline.checkpoint.header import read_header
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.fidelity.verdict import Check
from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.codebook import SCALE_LEVELS
from nf4_pipeline.progress import SILENT, Reporter


@dataclass(frozen=True)
class _Bounds:
    """How far weights and scales may be from the source, as each way of rounding can make them.

    Attributes:
        error: of a weight, as a share of the largest of its 64.
        scale: of a scale, as a share of its nested scale; None if scales are chosen freely.
        reach: of a scale without its sign, as a share of the largest of its 64 weights; None if
            the bound on its error says enough.
        words: what is said of scales.
    """

    error: float
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
        words="every scale as near as it can be stored",
    ),
    # A code makes up for the errors of those before it, so one weight may be far off; the scale is
    # chosen around the largest of weights that have been moved so, with either sign.
    "calibrated": _Bounds(
        error=1.5,
        scale=None,
        reach=2.0,
        words="no scale beyond 2 times the largest of its 64 weights",
    ),
}
_SAME_ERROR: Final = 0.01
"""Share by which a layer's error may differ from the manifest's four digits: readers give the
weights in 16 bit, the manifest speaks of float32."""
_ROUNDING: Final = 0.004  # of bfloat16 itself, for weights that are nearly exact


def file_gates(
    artifact: Path, manifest: dict[str, Any], reporter: Reporter = SILENT
) -> list[Check]:
    """Hashes all files and tensors of an artifact.

    Args:
        artifact: the export folder.
        manifest: read from it.
        reporter: told how far the hashing is.
    """
    wrong: list[str] = []
    tensors_found: dict[str, dict[str, Any]] = {}
    total = sum(entry["size"] for entry in manifest["files"].values())
    with reporter.task("check files", total) as task:
        for name, expected in manifest["files"].items():
            path = artifact / name
            if not path.is_file():
                wrong.append(f"{name} is missing")
                continue
            if name.endswith(".safetensors"):
                try:
                    headers = read_header(path)
                except CheckpointError as error:
                    wrong.append(str(error))
                    continue
                digest, by_name = digest_tensors(path, headers)
                task.advance(digest.size)
                for tensor in headers:
                    tensors_found[tensor.name] = {
                        "file": name,
                        "dtype": tensor.dtype,
                        "shape": list(tensor.shape),
                        "bytes": tensor.nbytes,
                        "sha256": by_name[tensor.name],
                    }
            else:
                digest = digest_file(path, task)
            if digest.to_json() != expected:
                wrong.append(f"{name} has other bytes ({digest.size:,}, {digest.sha256[:12]}…)")
    stray = [
        path.name for path in artifact.glob("*.safetensors") if path.name not in manifest["files"]
    ]
    wrong += [f"{name} is not in the manifest" for name in stray]
    return [
        Check(
            "files as in the manifest",
            not wrong,
            "; ".join(wrong[:3]) if wrong else f"{len(manifest['files'])} files hash right",
            f"{len(manifest['files'])} files, each with its sha256",
        ),
        _tensor_gate(manifest, tensors_found),
    ]


def _tensor_gate(manifest: dict[str, Any], found: dict[str, dict[str, Any]]) -> Check:
    expected = {
        part["name"]: {key: value for key, value in part.items() if key != "name"}
        for tensor in manifest["tensors"]
        for part in tensor["stored"]
    }
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    differ = sorted(n for n in set(found) & set(expected) if found[n] != expected[n])
    problems = [
        f"{what}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in (("missing", missing), ("extra", extra), ("different", differ))
        if names
    ]
    return Check(
        "tensors as in the manifest",
        not problems,
        "; ".join(problems) if problems else f"{len(found)} tensors as listed",
        f"{len(expected)} tensors with their dtype, shape and sha256",
    )


def manifest_gate(digest: FileDigest, recorded: FileDigest) -> Check:
    """The manifest itself, against what serialize recorded of it."""
    return Check(
        "manifest as serialize wrote it",
        digest == recorded,
        f"sha256 {digest.sha256[:12]}…",
        f"sha256 {recorded.sha256[:12]}…",
    )


def load_gate(error: str) -> Check:
    """An artifact that no loader takes."""
    return Check("the artifact loads", False, error, "a model on the device")


def reload_gates(manifest: dict[str, Any], loaded: dict[str, Any]) -> list[Check]:
    """What came back from disk in a fresh process, against the manifest.

    Args:
        manifest: of the artifact.
        loaded: "memory" ("linear4bit", "code_bytes", "kept_weights"), "missing", "unexpected".
    """
    memory = loaded["memory"]
    return [
        _modules_gate(manifest, memory["linear4bit"]),
        _names_gate(loaded["missing"], loaded["unexpected"]),
        _footprint_gate(manifest, memory),
    ]


def _modules_gate(manifest: dict[str, Any], linear4bit: list[str]) -> Check:
    expected = {tensor["module"] for tensor in manifest["tensors"] if tensor["quantized"]}
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


def _names_gate(missing: list[str], unexpected: list[str]) -> Check:
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


def _footprint_gate(manifest: dict[str, Any], memory: dict[str, Any]) -> Check:
    """What is in memory, in bytes of codes and in weights that are not 4 bit (however cast)."""
    codes = sum(
        part["bytes"]
        for tensor in manifest["tensors"]
        if tensor["quantized"]
        for part in tensor["stored"]
        if part["name"] == tensor["name"]
    )
    kept = sum(prod(tensor["shape"]) for tensor in manifest["tensors"] if not tensor["quantized"])
    found = (memory["code_bytes"], memory["kept_weights"])
    words = "{:,} bytes of codes, {:,} weights beside them"
    return Check(
        "what is in memory", found == (codes, kept), words.format(*found), words.format(codes, kept)
    )


def weights_gate(
    manifest: dict[str, Any], blocks: list[dict[str, Any]], outside: list[dict[str, Any]]
) -> Check:
    """Every 4-bit weight that the loader made, against the 16-bit weight of the source.

    Whatever the manifest says of itself, codes of another layer, in another order or with a wrong
    scale are far from what they stand for.

    Args:
        manifest: of the artifact; what its rounding can do is not held against it.
        blocks: as in verification.json, with "worst" and "worst_at" of each module.
        outside: modules that no block holds.
    """
    bounds = _BOUNDS[manifest["recipe"]["quantize"]["rounding"]]
    promised = {
        tensor["module"]: tensor["relative_rmse"]
        for tensor in manifest["tensors"]
        if tensor["quantized"]
    }
    compared = {module["name"]: module for module in outside}
    for block in blocks:
        compared |= {f"{block['name']}.{module['name']}": module for module in block["modules"]}
    problems = [(inf, f"{name} was not compared") for name in promised.keys() - compared.keys()]
    common = {name: compared[name] for name in promised if name in compared}
    for name, module in common.items():
        wrong = _wrong_weight(module, promised[name], bounds)
        if wrong:
            problems.append((wrong[0], f"{name} {wrong[1]}"))
    worst_first = [text for _, text in sorted(problems, reverse=True)]
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    largest = max((module["worst"] or 0.0 for module in common.values()), default=0.0)
    return Check(
        "weights near those of the source",
        not problems,
        "; ".join(worst_first[:3]) + more
        if problems
        else f"{len(common)} layers; no weight is off by more than {largest:.1%} of the largest of "
        "its 64",
        f"at most {bounds.error:.0%}, {bounds.words}, and each layer as in the manifest",
    )


def _wrong_weight(
    module: dict[str, Any], promised: float, bounds: _Bounds
) -> tuple[float, str] | None:
    """How bad, and what it is; None if the weight is what it should be."""
    error, worst = module["weight_error"], module["worst"]
    if error is None or worst is None:
        return inf, "is not finite"
    if worst > bounds.error:
        where = _weights(module["worst_at"])
        return worst, f"has an error of {worst:.0%} of the largest of 64 weights, at {where}"
    for key, bound, words in (
        ("scale", bounds.scale, "is off by {:.1%} of its nested scale"),
        ("reach", bounds.reach, "is {:.0%} of the largest of its 64 weights"),
    ):
        found = module.get(key, 0.0)
        if bound is None:
            continue
        if found is None or found > bound:
            said = "is not finite" if found is None else words.format(found)
            return inf, f"has a scale that {said}, at {_weights(module[f'{key}_at'])}"
    if abs(error - promised) > _SAME_ERROR * promised + _ROUNDING:
        return error, f"is off by {error:.4f}, not by {promised:.4f} as promised"
    return None


def _weights(block: int) -> str:
    return f"weights {block * BLOCK_SIZE:,} and on"


def kept_gate(count: int, changed: list[str]) -> Check:
    """What is not 4 bit, against the source.

    Args:
        count: parameters that were compared.
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
