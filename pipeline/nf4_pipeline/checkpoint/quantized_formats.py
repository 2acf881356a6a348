"""Which quantization a checkpoint already has, by its tensors, its config and the files beside it.

Tensors decide: config.json is silent about many formats, and each of them leaves traces in names
and dtypes. A scale alone is none: models learn scales, too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from nf4_pipeline.checkpoint.safetensors_header import HeaderTensor

_NOTES: Final = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
    "quantization_config.json": "",
}
"""Files that tools leave beside weights that they quantized; without such weights they say nothing,
and a file of no name in particular only where config.json is looked for."""

_IN_CONFIG: Final = ("quantization_config", "compression_config")

# In this order: the first that fits names the format. Each is a set of endings that must all be
# among the names of the tensors.
_BY_NAMES: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("GPTQ", (".qweight", ".qzeros", ".g_idx")),
    ("GPTQ or AWQ", (".qweight", ".qzeros")),
    ("GPTQ, Marlin layout", (".B", ".s")),
    ("EXL2", (".q_weight", ".q_scale")),
    ("EXL3", (".trellis",)),
    ("HQQ", (".W_q",)),
    ("AQLM", (".codebooks", ".codes")),
    ("QuIP#", (".Qidxs",)),
    ("VPTQ", (".centroids.weight", ".indices")),
    ("SpQR", (".dense_weights", ".row_offsets")),
    ("compressed-tensors, packed", (".weight_packed", ".weight_scale")),
    ("bitsandbytes NF4", (".quant_state.bitsandbytes__nf4",)),
    ("bitsandbytes FP4", (".quant_state.bitsandbytes__fp4",)),
    ("bitsandbytes 4-bit", (".absmax", ".quant_map")),
    ("bitsandbytes LLM.int8", (".SCB",)),
    ("quanto", (".weight._data", ".weight._scale")),
    ("NVFP4", (".weight_scale", ".weight_scale_2")),
    ("MXFP4", ("_blocks", "_scales")),
    ("EETQ", (".qweight", ".weight_scales")),
)

_FLOAT8: Final = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0"})
_INTEGERS: Final = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"})
_PACKED_NAME: Final = re.compile(r"(^|[._])weights?$|_proj$|(^|\.)(qweight|packed_weight)$")


def quantization_of(
    tensors: Iterable[HeaderTensor], config: Mapping[str, Any], names: Collection[str]
) -> str | None:
    """How a checkpoint is quantized and how that shows, in words; None if it is not.

    Args:
        tensors: of all of its weight files.
        config: its config.json.
        names: of the files in its folder.
    """
    tensors = list(tensors)
    said = _said(config, "config.json", 0) or _mlx(config, tensors)
    if said is not None:
        return said
    packed = _packed(tensors)
    if packed is None:
        return None
    how, trace = packed
    notes = [f"{name} beside it" for name in sorted(names) if name in _NOTES]
    if how in ("GPTQ or AWQ", "FP8", "packed integers"):
        by_note = [_NOTES[name] for name in sorted(names) if _NOTES.get(name)]
        how = f"{by_note[0]} ({how})" if by_note and by_note[0] not in how else how
        how = by_note[0] if how == "GPTQ or AWQ" and by_note else how
    return f"{how}: {', '.join([trace, *notes])}"


def _said(value: Any, place: str, depth: int) -> str | None:
    """What a config says of a quantization, at any depth: of its text_config, say."""
    if not isinstance(value, Mapping) or depth > 3:
        return None
    for key in _IN_CONFIG:
        inner = value.get(key)
        if inner:
            method = inner.get("quant_method", "unknown") if isinstance(inner, Mapping) else ""
            method = method[:80] if isinstance(method, str) else repr(method)[:80]
            return f"{_method_name(method)}: {key} in {place} says quant_method {method!r}"
    for key, inner in value.items():
        if (found := _said(inner, f"{place}, {str(key)[:80]}", depth + 1)) is not None:
            return found
    return None


def _method_name(method: object) -> str:
    known = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "mxfp4": "MXFP4"}
    return known.get(str(method), str(method) or "unknown")


def _mlx(config: Mapping[str, Any], tensors: list[HeaderTensor]) -> str | None:
    words = [t for t in tensors if t.dtype == "U32" and t.name.endswith(".weight")]
    said = config.get("quantization")
    if isinstance(said, Mapping) and "bits" in said and words:
        return f"MLX, {said['bits']} bit: quantization in config.json, {_shown(words[0])}"
    return None


def _packed(tensors: list[HeaderTensor]) -> tuple[str, str] | None:
    """The format and the tensor that shows it."""
    names = {tensor.name for tensor in tensors}
    by_ending: dict[str, HeaderTensor] = {}
    for how, endings in _BY_NAMES:
        for ending in endings:
            if ending not in by_ending:
                found = next((t for t in tensors if t.name.endswith(ending)), None)
                if found is not None:
                    by_ending[ending] = found
        if all(ending in by_ending for ending in endings):
            first = by_ending[endings[0]]
            if how == "GPTQ, Marlin layout" and first.dtype not in _INTEGERS:
                continue
            if how == "MXFP4" and first.dtype != "U8":
                continue
            return how, _shown(first)
    float8 = next((t for t in tensors if t.dtype in _FLOAT8 and len(t.shape) > 1), None)
    if float8 is not None:
        scale = next((n for n in names if n.startswith(float8.name + "_scale")), None)
        return "FP8", _shown(float8) + (f" with {scale!r}" if scale else "")
    words = next(
        (
            t
            for t in tensors
            if t.dtype in _INTEGERS and len(t.shape) > 1 and _PACKED_NAME.search(t.name)
        ),
        None,
    )
    if words is not None:
        stem = words.name.removesuffix(".weight")
        mlx = words.dtype == "U32" and {f"{stem}.scales", f"{stem}.biases"} <= names
        return ("MLX" if mlx else "packed integers"), _shown(words)
    return None


def _shown(tensor: HeaderTensor) -> str:
    return f"{tensor.name!r} is {tensor.dtype} of shape {list(tensor.shape)}"
