"""How weights are counted in blocks, and how their codes share bytes.

Two 4-bit codes share a byte, the earlier weight in the high half.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.codebook import ZERO_CODE


def blocks_of(weights: int) -> int:
    """How many blocks `weights` consecutive weights make; the last one may be ragged."""
    return -(-weights // BLOCK_SIZE)


def packed_bytes(weights: int) -> int:
    """How many bytes the codes of `weights` consecutive weights take."""
    return -(-weights // 2)


def pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One code each, uint8 of any shape -> two a byte, uint8 [ceil(n / 2)], padded if odd."""
    flat = codes.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(ZERO_CODE))
    packed: NDArray[np.uint8] = pack_pairs(flat)
    return packed


def pack_pairs(codes: Any) -> Any:
    """As `pack`, for an even number of codes in a NumPy array or a torch tensor: [n] -> [n / 2]."""
    high, low = rearrange(codes, "(byte half) -> half byte", half=2)
    return high << 4 | low


def unpack(packed: Any, weights: int) -> Any:
    """Two codes a byte, uint8, NumPy or torch, of any shape -> one code each, uint8 [weights]."""
    flat = packed.reshape(-1)
    return rearrange([flat >> 4, flat & 0x0F], "half byte -> (byte half)")[:weights]
