"""Which modules are plain linear maps, decided by what they compute and not by their class name.

transformers >= 5.5 quantizes a layer only if `type(module) is nn.Linear`; Falcon's projections are
`class FalconLinear(nn.Linear)` and are passed over. A subclass counts as plain here if its forward
gives what `nn.functional.linear` gives; routers and grouped projections do not, and are left alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

_IN, _OUT, _BATCH = 6, 4, 3


def is_plain_linear(module: Any) -> bool:
    """True if `module` is an nn.Linear, or a subclass that computes nothing else.

    Args:
        module: a torch module; may live on the meta device.
    """
    from torch import nn

    if type(module) is nn.Linear:
        return True
    if not isinstance(module, nn.Linear):
        return False
    kind: Any = type(module)
    holds_only_weights = (
        set(module._parameters) <= {"weight", "bias"}
        and not module._buffers
        and not module._modules
    )
    return holds_only_weights and _computes_linear(kind, module.bias is not None)


@cache
def _computes_linear(kind: Any, bias: bool) -> bool:
    """Runs the forward of a small module of class `kind` beside nn.functional.linear."""
    import torch
    from torch import nn

    probe = kind.__new__(kind)
    # The caller may be building a model on the meta device, where nothing can be computed.
    with torch.device("cpu"), torch.no_grad():
        nn.Linear.__init__(probe, _IN, _OUT, bias=bias, dtype=torch.float64)
        ramp = torch.arange(_BATCH * 2 * _IN, dtype=torch.float64).sin().reshape(_BATCH, 2, _IN)
        for index, parameter in enumerate(probe.parameters(), start=1):
            values = torch.arange(parameter.numel(), dtype=torch.float64) * index
            parameter.copy_(values.cos().reshape(parameter.shape))
        try:
            output = probe(ramp)
        except Exception:  # it needs more than a weight and an input, so it is not plain
            return False
        expected = nn.functional.linear(ramp, probe.weight, probe.bias)
    return (
        isinstance(output, torch.Tensor)
        and output.shape == expected.shape
        and torch.allclose(output, expected, rtol=1e-9, atol=1e-12)
    )


def weight_out_in(module: Any) -> Any:
    """The weight of a linear layer as [out_features, in_features], whatever its class.

    Args:
        module: an nn.Linear, a plain subclass, or transformers' Conv1D, which holds [in, out].

    Returns:
        A torch tensor that shares the layer's memory.
    """
    return as_held(module, module.weight)


def as_held(module: Any, weight: Any) -> Any:
    """A weight [out_features, in_features] in the shape in which a layer holds its own; see above.

    The way back is the same: what a layer holds, as [out_features, in_features].
    """
    from transformers.pytorch_utils import Conv1D

    return weight.T if isinstance(module, Conv1D) else weight
