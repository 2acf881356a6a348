"""Plain round to nearest beside an artifact that chose its codes in another way.

It needs no second artifact: a copy of the 4-bit model shares everything with it but the codes and
scales of its 4-bit layers, which are made from the 16-bit weights when a block opens and dropped
when it closes. The layers are the same, so both run through the same kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit

from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.model.linear import weight_out_in
from nf4_pipeline.nf4.float_bits import bits_of, dtype_name
from nf4_pipeline.nf4.rtn import round_to_nearest
from nf4_pipeline.runtime.bnb_cpu_fixes import repair


class RtnBaseline:
    """The 4-bit model as round to nearest would have made it.

    Args:
        reference: the 16-bit model; a weight is rounded as it stands there.
        model: the 4-bit one, which has computed nothing yet.
        kept: modules that are not 4 bit in it for what they would lose; in the baseline they are.

    Attributes:
        model: the baseline; a block of it can be run between `open` and `close`.
        blocks: of the baseline, by name.
    """

    def __init__(self, reference: StreamedModel, model: Any, kept: Sequence[str] = ()) -> None:
        own = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
        shared = [*model.parameters(), *model.buffers(), *(m.quant_state for m in own.values())]
        self.model = copy.deepcopy(model, {id(item): item for item in shared})
        self.blocks = {name: self.model.get_submodule(name) for name in reference.blocks}
        self._reference = reference
        self._own = own
        self._dtypes = {name: layer.weight.quant_state.dtype for name, layer in own.items()}
        for name in kept:
            layer = self.model.get_submodule(name)
            self.model.set_submodule(name, _empty(layer))
            own[name] = _empty(layer)  # what stands there again when the block closes
            self._dtypes[name] = layer.weight.dtype
        repair(self.model)
        for name in own:
            if not any(name.startswith(f"{block}.") for block in reference.blocks):
                self._round(name)

    def open(self, block: str) -> None:
        """Rounds the weights of a block that is open in the reference."""
        for name in self._layers(block):
            self._round(name)

    def close(self, block: str) -> None:
        """Drops them again."""
        for name in self._layers(block):
            own, layer = self._own[name], self.model.get_submodule(name)
            layer.weight, layer.quant_state = own.weight, own.quant_state

    def _layers(self, block: str) -> list[str]:
        return [name for name in self._own if name.startswith(f"{block}.")]

    def _round(self, name: str) -> None:
        source, layer = self._reference.model.get_submodule(name), self.model.get_submodule(name)
        weight = weight_out_in(source)
        if weight.isfinite().all():  # else no model gives a number, whatever the codes
            codes, companions = round_weight(weight.to(self._dtypes[name]))
            layer.weight = Params4bit.from_prequantized(
                codes, companions, device=weight.device, module=layer
            )


def _empty(layer: Any) -> Linear4bit:
    """A 4-bit layer for a plain one, with its bias and without a weight."""
    shape = weight_out_in(layer).shape
    empty = Linear4bit(
        shape[1],
        shape[0],
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    empty.bias = layer.bias
    return empty


def round_weight(weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rounds a weight to nearest, as an artifact stores it.

    Args:
        weight: bfloat16, float16 or float32, [out_features, in_features], all finite.

    Returns:
        Packed codes, uint8 [ceil(n / 2), 1], and the five tensors beside them by their suffix, on
        the CPU.
    """
    stored = round_to_nearest(bits_of(weight), dtype_name(weight)).tensors("")
    tensors = {suffix: torch.from_numpy(part.copy()) for suffix, part in stored.items()}
    return tensors.pop(""), tensors
