"""Falcon's attention by torch's fast kernels, on a GPU.

Falcon-7B has 71 heads with one set of keys, and leaves it to broadcasting; and it always gives a
mask, also where each token sees all before it. The fast kernels take neither. So torch computes the
slow way, from a copy of the keys and values for each head, in float32: on an H200 a step of 512
texts of 256 tokens takes a layer 5.6 ms instead of 0.06.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

_LAYER: Final = "FalconAttention"


def use_fast_attention(model: torch.nn.Module) -> None:
    """Has a Falcon compute attention fast, in 16 bit on a GPU; changes no bit elsewhere.

    Its inputs must then be whole texts, without padding, and a cache hold what it has seen and no
    more: each token sees all before it.

    Args:
        model: of transformers.
    """
    for module in model.modules():
        if type(module).__name__ == _LAYER:
            vars(module)["forward"] = partial(_without_mask, module.forward)


def _without_mask(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _WithoutMask():
        return forward(*args, **kwargs)


class _WithoutMask(TorchFunctionMode):
    """While it is active, what a fast kernel can compute is asked for so that it does."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not scaled_dot_product_attention:  # dozens for each layer and token
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = dict(kwargs or {})
        return func(*args, **kwargs | _asked_for_fast(*args, **kwargs))


def _asked_for_fast(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *positional: Any,
    attn_mask: torch.Tensor | None = None,
    **_: Any,
) -> dict[str, Any]:
    """What to ask for instead, or nothing: with alibi a mask is numbers, and is needed."""
    if positional or not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return {}
    shared = query.shape[1] != key.shape[1]
    if attn_mask is None:
        return {"enable_gqa": shared}
    tokens, seen = query.shape[-2], key.shape[-2]
    if attn_mask.dtype != torch.bool or tokens not in (1, seen):
        return {}
    return {"attn_mask": None, "is_causal": tokens > 1, "enable_gqa": shared}
