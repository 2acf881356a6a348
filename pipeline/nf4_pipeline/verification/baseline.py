"""Other codes for the layers of an artifact: round to nearest, or such as stand in files.

It needs no second artifact: a copy of the 4-bit model shares everything with it but the codes and
scales of its 4-bit layers, which are made when a block opens and dropped when it closes. The layers
are the same, so both run through the same kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit

from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.gptq.saved_codes import read_codes
from nf4_pipeline.model.linear import weight_out_in
from nf4_pipeline.nf4.float_bits import bits_of, dtype_name
from nf4_pipeline.nf4.rtn import round_to_nearest
from nf4_pipeline.nf4.stored_weight import StoredWeight
from nf4_pipeline.runtime.bnb_cpu_fixes import repair
from nf4_pipeline.verification.messages import SavedCodes


class Baseline:
    """The 4-bit model as round to nearest would have made it, or with codes that were saved.

    Args:
        reference: the 16-bit model; a weight is rounded as it stands there.
        model: the 4-bit one, which has computed nothing yet.
        kept: modules that are not 4 bit in it for what they would lose; in the baseline they are.
        saved: codes and scales, by module; the weights of all others are rounded to nearest.

    Attributes:
        model: the baseline; a block of it can be run between `open` and `close`.
        blocks: of the baseline, by name.
    """

    def __init__(
        self,
        reference: StreamedModel,
        model: Any,
        kept: Sequence[str] = (),
        saved: Mapping[str, SavedCodes] | None = None,
    ) -> None:
        own = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
        shared = [*model.parameters(), *model.buffers(), *(m.quant_state for m in own.values())]
        self.model = copy.deepcopy(model, {id(item): item for item in shared})
        self.blocks = {name: self.model.get_submodule(name) for name in reference.blocks}
        self._reference = reference
        self._saved = saved or {}
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
                self._give(name)

    def open(self, block: str) -> None:
        """Gives the layers of a block their weights; it is open in the reference."""
        for name in self._layers(block):
            self._give(name)

    def close(self, block: str) -> None:
        """Drops them again."""
        for name in self._layers(block):
            own, layer = self._own[name], self.model.get_submodule(name)
            layer.weight, layer.quant_state = own.weight, own.quant_state

    def _layers(self, block: str) -> list[str]:
        return [name for name in self._own if name.startswith(f"{block}.")]

    def _give(self, name: str) -> None:
        source, layer = self._reference.model.get_submodule(name), self.model.get_submodule(name)
        weight = weight_out_in(source)
        if weight.isfinite().all():  # else no model gives a number, whatever the codes
            exact = weight.to(self._dtypes[name])
            saved = self._saved.get(name)
            divisor = self._reference.divisor(f"{name}.weight")
            codes, companions = (
                round_weight(exact) if saved is None else _read(saved, exact, divisor)
            )
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
    return _parts(round_to_nearest(bits_of(weight), dtype_name(weight)))


def _read(
    saved: SavedCodes, weight: torch.Tensor, divisor: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Codes and scales from a file, as `round_weight` gives them for a weight that is divided."""
    packed, scales = read_codes(saved.file, saved.weight)
    scales = scales.divided_by(divisor)
    return _parts(StoredWeight(packed, scales, tuple(weight.shape), dtype_name(weight)))


def _parts(weight: StoredWeight) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    stored = weight.tensors("")
    tensors = {suffix: torch.from_numpy(part.copy()) for suffix, part in stored.items()}
    return tensors.pop(""), tensors
