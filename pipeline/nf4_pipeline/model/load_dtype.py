"""The precision that transformers would load a checkpoint in."""

from __future__ import annotations

import re
from typing import Any, Final

from nf4_pipeline.checkpoint.source import Checkpoint
from nf4_pipeline.errors import UsageError

_FLOATS: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def stored_dtype(config: Any, checkpoint: Checkpoint) -> Any:
    """The torch dtype of a checkpoint: what its config says, else that of its first weight.

    Args:
        config: its transformers config.
        checkpoint: its headers.
    """
    import torch

    declared = getattr(config, "dtype", None)
    if isinstance(declared, torch.dtype):
        return declared
    first = (_FLOATS[t.header.dtype] for t in checkpoint.tensors if t.header.dtype in _FLOATS)
    return getattr(torch, next(first, "float32"))


def compute_dtype(declared: Any, device: str, wanted: str = "auto") -> Any:
    """What to compute in.

    Args:
        declared: torch dtype that the config names, or None.
        device: "cpu" or "cuda:N".
        wanted: name of a torch dtype, or "auto".

    Returns:
        A torch dtype, or None if nothing says otherwise than the weights. float16 stands in for
        bfloat16 on GPUs before Ampere (compute capability 8), which have no arithmetic for it.

    Raises:
        UsageError: `wanted` names no dtype that models are computed in.
    """
    import torch

    if wanted != "auto":
        if wanted not in ("bfloat16", "float16", "float32"):
            raise UsageError(f"dtype is {wanted!r}; expected auto, bfloat16, float16 or float32.")
        return getattr(torch, wanted)
    if declared == torch.bfloat16 and device.startswith("cuda"):
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16
    return declared if isinstance(declared, torch.dtype) else None


def float32_parts(model: Any, dtype: Any) -> re.Pattern[str] | None:
    """Which parameters an architecture wants in float32 when the model is in `dtype`.

    Args:
        model: a transformers model.
        dtype: torch dtype of the model.

    Returns:
        A pattern to search a parameter's name with, or None if there are none.
    """
    import torch

    parts: list[str] = []
    if dtype == torch.float16:
        parts += getattr(model, "_keep_in_fp32_modules", None) or ()
    if dtype in (torch.float16, torch.bfloat16):
        parts += getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    patterns = (re.escape(part).replace(r"\*", ".*") for part in sorted(parts))
    return re.compile("|".join(patterns)) if parts else None
