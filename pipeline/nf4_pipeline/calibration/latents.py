"""Codes that learn: a latent for each weight, whose nearest level is its code.

A latent is kept as `weight / scale`, where scales stay as they are, in 16-bit fixed point. It
begins where the 16-bit weight stands in the bin of its code, squashed into the bin: no weight
stands on an edge, as those would that error compensation moved to another bin, and how many stand
near one is finite. From there a step is taken against the gradient of the dequantized weight, as if
rounding were not there (straight-through). How far is a share of the block's scale, and so of the
bins: where weights are small, be it that their inputs are large, steps are small, too. What is
stored are codes; latents are gone with the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from nf4_pipeline.calibration.host_memory import HostMemory
from nf4_pipeline.model.linear import as_held, weight_out_in
from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.codebook import NF4_LEVELS, NF4_MIDPOINTS, ZERO_CODE
from nf4_pipeline.nf4.float_bits import bits_of, dtype_name
from nf4_pipeline.nf4.packing import blocks_of, pack, unpack
from nf4_pipeline.nf4.rtn import round_to_nearest

_HALF: Final = 2**15
_UNIT: Final = 1.25 / (_HALF - 1)  # of fixed point; some 1,000 units to the narrowest bin
_OUTER_EDGE: Final = np.float32(1.15)
"""Where the outer bins end for the purpose of squashing; they have no end."""
_MOMENTUM: Final = 0.9
_DECAY: Final = 0.99  # of second moments


def _codes_of_units() -> NDArray[np.uint8]:
    """The code of each latent, from -2**15 to 2**15 - 1."""
    values = (np.arange(-_HALF, _HALF) * _UNIT).astype(np.float32)
    return np.searchsorted(NF4_MIDPOINTS, values, side="left").astype(np.uint8)


_CODES: Final = _codes_of_units()
_FIRST: Final = np.searchsorted(_CODES, np.arange(16), side="left") - _HALF
_LAST: Final = np.searchsorted(_CODES, np.arange(16), side="right") - 1 - _HALF
"""The first and the last latent of each code."""


STATE: Final = ("latent", "momentum", "rows", "columns")
"""What `LearnedWeight.state` tells."""
_NUMBERS: Final = ("latent", "momentum", "_scales")
"""Of a weight, in as many elements or nearly: what waits elsewhere if a device is small."""


def round_in_place(module: Any) -> None:
    """Gives a layer the weight that rounding to nearest leaves of it."""
    exact = weight_out_in(module)
    nearest = round_to_nearest(bits_of(exact), dtype_name(exact)).dequantize()
    module.weight.data.copy_(as_held(module, torch.from_numpy(nearest)))


class Tables:
    """What latents are looked up in, on a device.

    Args:
        device: of torch.
    """

    def __init__(self, device: torch.device) -> None:
        edges = np.concatenate([[-_OUTER_EDGE], NF4_MIDPOINTS, [_OUTER_EDGE]]).astype(np.float32)

        def on_device(values: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device)

        self.codes = on_device(_CODES)
        self.levels = on_device(NF4_LEVELS[_CODES])
        self.middle = on_device((edges[:-1] + edges[1:]) / 2)
        self.half_width = on_device((edges[1:] - edges[:-1]) / 2)
        self.first = on_device(_FIRST.astype(np.float32))
        self.last = on_device(_LAST.astype(np.float32))


class LearnedWeight:
    """One weight: its latents, and what its steps are made of.

    Args:
        module: of the model that learns; its weight becomes that of the codes, and gets gradients.
        exact: the 16-bit weight, [out_features, in_features].
        packed: the codes it begins with, two a byte.
        scales: float32 [blocks]; they stay.
        tables: on the module's device.

    Attributes:
        momentum: sum of gradients, each step's counting 0.9 of the next one's; as the module holds
            its weight. On a GPU it is the buffer that gradients are added to.
        latent: int16 [blocks, 64], the last block padded.
        rows: second moments by row, float32.
        columns: second moments by column, float32.
    """

    def __init__(
        self,
        module: Any,
        exact: torch.Tensor,
        packed: NDArray[np.uint8],
        scales: NDArray[np.float32],
        tables: Tables,
    ) -> None:
        device = module.weight.device
        self.module = module
        self.shape = tuple(exact.shape)
        self._count = exact.numel()
        self._tables = tables
        self._scales = torch.from_numpy(scales).to(device)
        self.latent = torch.empty(len(scales), BLOCK_SIZE, dtype=torch.int16, device=device)
        self.rows = torch.zeros(self.shape[0], device=device)
        self.columns = torch.zeros(self.shape[1], device=device)
        self._squares = torch.zeros_like(self.rows), torch.zeros_like(self.columns)
        self._waiting: dict[str, torch.Tensor] = {}
        module.weight.requires_grad_(True)
        self.momentum = torch.zeros_like(module.weight, requires_grad=False)
        self.begin(exact, packed)

    def begin(self, exact: torch.Tensor, packed: NDArray[np.uint8]) -> None:
        """Puts latents where the 16-bit weight stands in the bins of codes; forgets what was.

        Args:
            exact: the 16-bit weight, [out_features, in_features].
            packed: codes, two a byte.
        """
        tables = self._tables
        codes = unpack(torch.from_numpy(packed).to(self.latent.device), self._count)
        code = self._blocks(codes, ZERO_CODE).int()
        scale = self._scales.where(self._scales != 0, 1.0)[:, None]
        relative = self._blocks(exact.float().reshape(-1), 0.0) / scale
        place = (relative - tables.middle[code]) / tables.half_width[code]
        place = place.sign() * (1 - torch.exp(-place.abs()))
        units = (tables.middle[code] + tables.half_width[code] * place) / _UNIT
        # Rounding must not carry a weight that is far from its bin over the edge.
        units = torch.minimum(torch.maximum(units.round(), tables.first[code]), tables.last[code])
        self.latent.copy_(units)
        for state in (self.momentum, self.rows, self.columns):
            state.zero_()
        self.dequantize()

    def wait_in(self, memory: HostMemory) -> None:
        """Leaves the device; from now on it is there between `arrive` and `leave`."""
        self._waiting = {name: memory.keep(getattr(self, name)) for name in _NUMBERS}
        self.leave(changed=False)

    def arrive(self, *, learning: bool) -> None:
        """Gives the module its weight on the device.

        Args:
            learning: it will take a step.
        """
        device = self.rows.device
        for name in _NUMBERS:
            if learning or name != "momentum":
                setattr(self, name, self._waiting[name].to(device, non_blocking=True))
        weight = torch.empty_like(self._waiting["momentum"], device=device)
        self.module.weight = torch.nn.Parameter(weight)
        self.dequantize()

    def leave(self, *, changed: bool) -> None:
        """Takes the weight from the module.

        Args:
            changed: it took a step, and what it is now is kept.
        """
        for name, waiting in self._waiting.items():
            if changed:
                waiting.copy_(getattr(self, name), non_blocking=True)
            setattr(self, name, waiting)
        meta = torch.empty_like(self.momentum, device="meta")
        self.module.weight = torch.nn.Parameter(meta, requires_grad=False)

    def state(self) -> dict[str, NDArray[Any]]:
        """All that its next step depends on."""
        return {
            "latent": self.latent.cpu().numpy(),
            "momentum": bits_of(self.momentum),
            "rows": self.rows.cpu().numpy(),
            "columns": self.columns.cpu().numpy(),
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Takes up what `state` gave."""
        for part in ("latent", "rows", "columns"):
            getattr(self, part).copy_(torch.from_numpy(state[part]))
        momentum = torch.from_numpy(state["momentum"].view(np.uint8).reshape(-1))
        self.momentum.copy_(momentum.view(self.momentum.dtype).view(self.momentum.shape))
        if not self._waiting:
            self.dequantize()

    def dequantize(self) -> None:
        """Gives the module the weight that the codes stand for."""
        levels = self._tables.levels[self.latent.int() + _HALF]
        value = (levels * self._scales[:, None]).reshape(-1)[: self._count].view(self.shape)
        self.module.weight.data.copy_(as_held(self.module, value))

    def decay(self) -> None:
        """Before the gradients of a step are added to it, momentum fades."""
        self.momentum.mul_(_MOMENTUM)
        for squares in self._squares:
            squares.zero_()

    def sums(self) -> tuple[torch.Tensor, ...]:
        """What the gradients of a step are added to: momentum, and the sums of their squares."""
        return self.momentum, *self._squares

    def watch(self, gradient: torch.Tensor) -> None:
        """Takes the squares of a gradient that something else adds to momentum.

        Args:
            gradient: of a part of the tokens of a step, as the module holds its weight.
        """
        squares = as_held(self.module, gradient).float().square()
        for total, dimension in zip(self._squares, (1, 0), strict=True):
            total.add_(squares.mean(dimension))

    def add(self, gradient: torch.Tensor) -> None:
        """Adds a gradient to momentum, and takes its squares; see `watch`."""
        self.watch(gradient)
        self.momentum.add_(gradient)

    def step(self, rate: float, number: int) -> None:
        """Moves latents against the momentum, each by its own measure; the module follows.

        Adam's rule, but second moments are factored into rows and columns, and are sums over the
        parts of a step, whose gradients hardly hang together: so none needs a second buffer.

        Args:
            rate: as a share of the scale of each block.
            number: of the step since `begin`, from 1.
        """
        momentum = as_held(self.module, self.momentum).float()
        for kept, squares in zip((self.rows, self.columns), self._squares, strict=True):
            kept.lerp_(squares, 1 - _DECAY)
        seen = 1 - _DECAY**number
        rows, columns = (self.rows / seen).sqrt(), (self.columns / seen).sqrt()
        mean = (self.rows / seen).mean().sqrt()
        size = (1 - _MOMENTUM) / (1 - _MOMENTUM**number) * rate / _UNIT
        step = momentum.mul(mean * size).div_(rows[:, None] * columns + 1e-30)
        step = self._blocks(step.reshape(-1), 0.0) * self._scales.sign()[:, None]
        step = step.nan_to_num_(0.0, 0.0, 0.0).round_()
        moved = self.latent.float().sub_(step).clamp_(1 - _HALF, _HALF - 1)
        self.latent.copy_(moved)
        self.dequantize()

    def packed(self) -> NDArray[np.uint8]:
        """The codes, two a byte."""
        latent = self.latent.to(self.rows.device)
        codes = self._tables.codes[latent.int() + _HALF].reshape(-1)[: self._count]
        return pack(codes.cpu().numpy())

    def _blocks(self, flat: torch.Tensor, padding: float) -> torch.Tensor:
        """[n] -> [blocks, 64], the last one padded."""
        missing = blocks_of(self._count) * BLOCK_SIZE - self._count
        if missing:
            flat = torch.nn.functional.pad(flat, (0, missing), value=padding)
        blocks: torch.Tensor = rearrange(flat, "(block weight) -> block weight", weight=BLOCK_SIZE)
        return blocks
