"""The precision that transformers would load a checkpoint in."""

from __future__ import annotations

import re
from typing import Any, Final

from pipeline.checkpoint.source import Checkpoint

_FLOATS: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def stored_dtype(config: Any, checkpoint: Checkpoint) -> Any:
    """The torch dtype of a checkpoint: what its config says, else that of its first weight.

    Args:
        config: its transformers config.
        checkpoint: its headers.
    """
    import torch

    said = getattr(config, "dtype", None)
    if isinstance(said, torch.dtype):
        return said
    first = (_FLOATS[t.header.dtype] for t in checkpoint.tensors if t.header.dtype in _FLOATS)
    return getattr(torch, next(first, "float32"))


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
