"""Falcon's attention by torch's fast kernels, on a GPU.

Falcon-7B has 71 heads with one set of keys, and leaves it to broadcasting; and it always gives a
mask, also where each token sees all before it. The fast kernels take neither. So torch computes the
slow way, from a copy of the keys and values for each head, in float32: most of the time that the
model takes to write, and a quarter of what learning takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

_LAYER: Final = "FalconAttention"


def use_fast_attention(model: torch.nn.Module) -> None:
    """Has a Falcon compute attention fast, in 16 bit on a GPU; changes nothing elsewhere.

    Its inputs must then be whole texts, without padding.

    Args:
        model: of transformers.
    """
    for module in model.modules():
        if type(module).__name__ == _LAYER:
            module.register_forward_pre_hook(_begin)
            module.register_forward_hook(_end, always_call=True)


class _WithoutMask(TorchFunctionMode):
    """While it is active, what a fast kernel can compute is asked for so that it does."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is scaled_dot_product_attention:
            kwargs |= _asked_for_fast(*args, **kwargs)
        return func(*args, **kwargs)


def _asked_for_fast(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    **_: Any,
) -> dict[str, Any]:
    """What to ask for instead, or nothing: with alibi a mask is numbers, and is needed."""
    tokens, seen = query.shape[-2], key.shape[-2]
    plain = attn_mask is not None and attn_mask.dtype == torch.bool and tokens in (1, seen)
    if not (plain and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)):
        return {}
    shared = query.shape[1] != key.shape[1]
    return {"attn_mask": None, "is_causal": tokens > 1, "enable_gqa": shared}


# Modes are a stack of the thread, and calls of modules are nested: what ends is what began last.
def _begin(*_: Any) -> None:
    _WithoutMask().__enter__()  # type: ignore[no-untyped-call]


def _end(*_: Any) -> None:
    _WithoutMask().__exit__(None, None, None)  # type: ignore[no-untyped-call]
