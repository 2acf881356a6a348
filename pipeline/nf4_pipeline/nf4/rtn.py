"""A whole weight rounded to nearest, in memory: for what is not streamed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.nf4 import BLOCK_SIZE, cpu
from nf4_pipeline.nf4.double_quant import double_quantize
from nf4_pipeline.nf4.packing import blocks_of, packed_bytes
from nf4_pipeline.nf4.stored_weight import StoredWeight

_PART: Final = 2**20  # weights that one thread rounds at a time; whole blocks


def round_to_nearest(bits: NDArray[Any], dtype: str) -> StoredWeight:
    """What an artifact of round to nearest stores of a weight.

    Args:
        bits: the weights' bits, [out_features, in_features], row after row: uint16 for "bfloat16"
            and "float16", uint32 for "float32"; all of them finite.
        dtype: what the bits mean.
    """
    flat = bits.reshape(-1)
    packed = np.empty(packed_bytes(flat.size), np.uint8)
    absmax = np.empty(blocks_of(flat.size), np.float32)
    sums = np.empty((absmax.size, 3), np.int32)

    def part(start: int) -> None:
        end = min(start + _PART, flat.size)
        blocks = slice(start // BLOCK_SIZE, blocks_of(end))
        codes = packed[start // 2 : packed_bytes(end)]
        cpu.quantize_blocks(flat[start:end], dtype, codes, absmax[blocks], sums[blocks])

    with ThreadPoolExecutor() as pool:
        list(pool.map(part, range(0, flat.size, _PART)))
    return StoredWeight(packed, double_quantize(absmax), bits.shape, dtype)
