"""The way back, in plain NumPy: what every reader of the format computes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.codebook import NF4_LEVELS


def unpack(packed: NDArray[np.uint8], weights: int) -> NDArray[np.uint8]:
    """Two codes a byte, the earlier one in the high half -> one code each, uint8 [weights]."""
    codes = np.empty(2 * packed.size, np.uint8)
    codes[0::2] = packed.reshape(-1) >> 4
    codes[1::2] = packed.reshape(-1) & 0x0F
    return codes[:weights]


def dequantize(
    packed: NDArray[np.uint8], scales: NDArray[np.float32], shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """`level[code] * scale`, in float32.

    Args:
        packed: uint8, ceil(n / 2) bytes.
        scales: float32 [ceil(n / 64)], as `NestedScales.scales` gives them.
        shape: of the weight; its product is n.
    """
    weights = int(np.prod(shape))
    values = NF4_LEVELS[unpack(packed, weights)]
    return (values * np.repeat(scales, BLOCK_SIZE)[:weights]).reshape(shape)
