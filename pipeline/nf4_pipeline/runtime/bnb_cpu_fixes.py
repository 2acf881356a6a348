"""4-bit layers that bitsandbytes 0.50 computes wrongly, or not at all, on a CPU.

Its AVX512-BF16 path asserts that out_features is a multiple of 32 and in_features of 64; its
`dequantize_4bit` takes wrong scales if in_features is a multiple of 16 but not of 64, and then the
weights are a quarter off without a word. As one long row, every weight is dequantized right.
"""

from __future__ import annotations

import copy
from typing import Any


def repair(model: Any) -> None:
    """Gives layers of awkward shape on the CPU a forward that dequantizes their weight right.

    Args:
        model: a loaded model; the layers stay `Linear4bit`.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        awkward = isinstance(module, Linear4bit) and (
            module.in_features % 64 != 0 or module.out_features % 32 != 0
        )
        if awkward and module.weight.device.type == "cpu":
            module.__class__ = _flat_linear(type(module))


def dequantized(module: Any) -> Any:
    """The weight that a 4-bit layer computes with, in the dtype that it was quantized from.

    Args:
        module: a loaded `Linear4bit` that has computed nothing yet: on CPUs with AVX512-BF16
            bitsandbytes then puts its codes into another order.

    Returns:
        A torch tensor, [out_features, in_features].
    """
    import bitsandbytes.functional
    import torch

    state = copy.copy(module.weight.quant_state)
    shape = state.shape
    state.shape = torch.Size([shape.numel()])
    return bitsandbytes.functional.dequantize_4bit(module.weight.data, state).reshape(shape)


def stored_scales(module: Any) -> tuple[Any, Any]:
    """The scales that a 4-bit layer computes with.

    Args:
        module: a loaded `Linear4bit` with double quantization that has computed nothing yet.

    Returns:
        The scale of each block of 64, and the nested scale that it is stored by: float32 tensors,
        [blocks].
    """
    import bitsandbytes.functional

    state = module.weight.quant_state
    scales = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2)
    nested = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: scales.numel()]
    return scales.float() + state.offset, nested


def _flat_linear(kind: type) -> type:
    """A subclass of a 4-bit layer's class with the forward that is right for any shape."""
    import torch

    class FlatLinear4bit(kind):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            compute = self.compute_dtype or x.dtype
            bias = None if self.bias is None else self.bias.to(compute)
            weight = dequantized(self).to(compute)
            return torch.nn.functional.linear(x.to(compute), weight, bias).to(x.dtype)

    FlatLinear4bit.__name__ = kind.__name__
    return FlatLinear4bit
