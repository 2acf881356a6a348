"""The way back: what every reader of the format computes, `level[code] * scale` in float32."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from einops import repeat
from numpy.typing import NDArray

from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.codebook import NF4_LEVELS
from nf4_pipeline.nf4.packing import unpack

if TYPE_CHECKING:
    import torch

_BYTES: Final = np.arange(256)
_PAIRS: Final = NF4_LEVELS[np.stack([_BYTES >> 4, _BYTES & 15], axis=1)].view(np.uint64)[:, 0]
"""The two levels of each byte, as one number: `take` of 64 bits is thirty times as fast as of two
floats."""


def dequantize(
    packed: NDArray[np.uint8], scales: NDArray[np.float32], shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """The weight that codes and scales stand for, in plain NumPy.

    Args:
        packed: uint8, ceil(n / 2) bytes.
        scales: float32 [ceil(n / 64)], as `NestedScales.scales` gives them.
        shape: of the weight; its product is n.

    Returns:
        float32, of that shape.
    """
    levels = _PAIRS.take(packed.reshape(-1)).view(np.float32)[: prod(shape)]
    weight: NDArray[np.float32] = (levels * _of_each(scales, shape)).reshape(shape)
    return weight


def dequantize_on(
    device: torch.device,
    packed: NDArray[np.uint8],
    scales: NDArray[np.float32],
    shape: tuple[int, ...],
) -> torch.Tensor:
    """As `dequantize`, computed on a device of torch.

    Returns:
        float32 on the device, of that shape.
    """
    import torch

    codes = unpack(torch.from_numpy(packed).to(device), prod(shape))
    levels = torch.from_numpy(NF4_LEVELS.copy()).to(device)
    each = _of_each(torch.from_numpy(scales).to(device), shape)
    weight: torch.Tensor = (levels[codes.int()] * each).reshape(shape)
    return weight


def _of_each(scales: Any, shape: tuple[int, ...]) -> Any:
    """The scale of each weight, [n], from that of each block."""
    return repeat(scales, "block -> (block weight)", weight=BLOCK_SIZE)[: prod(shape)]
