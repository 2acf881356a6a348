"""A whole weight rounded to nearest, in memory: for what is not streamed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.nf4 import BLOCK_SIZE, cpu
from nf4_pipeline.nf4.double_quant import NestedScales, double_quantize
from nf4_pipeline.nf4.layout import blocks_of

_PART: Final = 2**20  # weights that one thread rounds at a time; whole blocks


def round_to_nearest(bits: NDArray[Any], dtype: str) -> tuple[NDArray[np.uint8], NestedScales]:
    """What an artifact of round to nearest stores of a weight.

    Args:
        bits: the weights' bits, [n]: uint16 for "bfloat16" and "float16", uint32 for "float32";
            all of them finite.
        dtype: what the bits mean.

    Returns:
        Packed codes, uint8 [ceil(n / 2)], and the scales.
    """
    packed = np.empty(-(-bits.size // 2), np.uint8)
    absmax = np.empty(blocks_of(bits.size), np.float32)
    sums = np.empty((absmax.size, 3), np.int32)

    def part(start: int) -> None:
        end = min(start + _PART, bits.size)
        blocks = slice(start // BLOCK_SIZE, blocks_of(end))
        codes = packed[start // 2 : -(-end // 2)]
        cpu.quantize_blocks(bits[start:end], dtype, codes, absmax[blocks], sums[blocks])

    with ThreadPoolExecutor() as pool:
        list(pool.map(part, range(0, bits.size, _PART)))
    return packed, double_quantize(absmax)
