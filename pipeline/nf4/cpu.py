"""Compiled CPU kernels (numba). Each releases the GIL and works on one chunk; threads run chunks.

The arithmetic is that of `bitsandbytes.functional.quantize_4bit` on a CPU (0.50), bit for bit:

    absmax = max |w| over a block of 64                              (float32)
    x      = w * (1 / max(absmax, 1e-38))                            (float32, whole blocks)
    x      = w / max(absmax, 1e-38), and that maximum is stored      (a ragged last block)
    code   = number of midpoints strictly below x

Two codes share a byte, the earlier weight in the high half.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE
from pipeline.nf4.codebook import (
    NF4_LEVELS,
    NF4_MIDPOINTS,
    SCALE_MIDPOINTS,
)

_SMALLEST: Final = np.float32(1e-38)  # keeps 1 / absmax finite for a block of zeros
_ZERO: Final = np.float32(0.0)
_ONE: Final = np.float32(1.0)
# float16 bits shifted into a float32's place are 2**112 too small; the product is exact.
_HALF_SCALE: Final = np.float32(2.0**112)


@njit(cache=True, nogil=True)
def _widen(bits, half, start, count, out):  # type: ignore[no-untyped-def]
    """The bits of `count` weights -> float32 bits in `out`, exact; `half` says they are float16."""
    if bits.itemsize == 4:
        for i in range(count):
            out[i] = bits[start + i]
    elif not half:
        for i in range(count):
            out[i] = np.uint32(bits[start + i]) << np.uint32(16)
    else:
        values = out.view(np.float32)
        for i in range(count):
            magnitude = (np.uint32(bits[start + i]) & np.uint32(0x7FFF)) << np.uint32(13)
            sign = (np.uint32(bits[start + i]) & np.uint32(0x8000)) << np.uint32(16)
            special = np.uint32(0x7F800000) if magnitude >= np.uint32(0x0F800000) else np.uint32(0)
            out[i] = magnitude
            values[i] *= _HALF_SCALE
            out[i] |= sign | special


# Named one by one, since LLVM keeps scalars in registers but reloads an array's items.
_M0, _M1, _M2, _M3, _M4, _M5, _M6, _M7 = NF4_MIDPOINTS[:8]
_M8, _M9, _M10, _M11, _M12, _M13, _M14 = NF4_MIDPOINTS[8:]
_LANES: Final = 16


@njit(cache=True, nogil=True, error_model="numpy")
def _quantize_blocks(bits, half, packed, absmax, sums):  # type: ignore[no-untyped-def]
    count = bits.size
    block_bits = np.zeros(BLOCK_SIZE, np.uint32)
    block = block_bits.view(np.float32)
    largest_bits = np.zeros(1, np.uint32)
    largest = largest_bits.view(np.float32)
    scaled = np.zeros(BLOCK_SIZE, np.float32)
    codes = np.zeros(BLOCK_SIZE, np.int32)
    levels = np.zeros(BLOCK_SIZE, np.float32)
    pairs = np.zeros(BLOCK_SIZE // 2, np.uint8)
    lanes = np.zeros((3, _LANES), np.float32)
    for b in range(absmax.size):
        start = b * BLOCK_SIZE
        n = min(BLOCK_SIZE, count - start)
        if n < BLOCK_SIZE:
            # Zero weights pad a ragged block: their code is the padding that bitsandbytes
            # writes into the last byte, and their level adds nothing to the sums.
            block_bits[:] = 0
        _widen(bits, half, start, n, block_bits)

        # Without the sign, the order of the bits is the order of the magnitudes, and a NaN
        # comes out above infinity instead of vanishing in a comparison.
        top = np.uint32(0)
        for i in range(BLOCK_SIZE):
            top = max(top, block_bits[i] & np.uint32(0x7FFFFFFF))
        if top >= np.uint32(0x7F800000):
            return b
        largest_bits[0] = top
        safe = max(largest[0], _SMALLEST)
        if n == BLOCK_SIZE:
            absmax[b] = largest[0]
            inverse = _ONE / safe
            for i in range(BLOCK_SIZE):
                scaled[i] = block[i] * inverse
        else:
            absmax[b] = safe
            for i in range(BLOCK_SIZE):
                scaled[i] = block[i] / safe

        # The number of midpoints below x, by bisection: each comparison gives one bit of it.
        for i in range(BLOCK_SIZE):
            x = scaled[i]
            b3 = x > _M7
            b2 = x > (_M11 if b3 else _M3)
            b1 = x > ((_M13 if b2 else _M9) if b3 else (_M5 if b2 else _M1))
            upper = (_M14 if b1 else _M12) if b2 else (_M10 if b1 else _M8)
            lower = (_M6 if b1 else _M4) if b2 else (_M2 if b1 else _M0)
            b0 = x > (upper if b3 else lower)
            code = np.int32(b3) << 3 | np.int32(b2) << 2 | np.int32(b1) << 1 | np.int32(b0)
            codes[i] = code
            levels[i] = NF4_LEVELS[code]
        for i in range(BLOCK_SIZE // 2):
            pairs[i] = np.uint8(codes[2 * i] << 4 | codes[2 * i + 1])
        for i in range((n + 1) // 2):
            packed[start // 2 + i] = pairs[i]

        # Sixteen running sums, folded in a fixed order: the same float32 bits on every machine.
        for lane in range(_LANES):
            energy = _ZERO
            cross = _ZERO
            level_energy = _ZERO
            for row in range(BLOCK_SIZE // _LANES):
                x = scaled[row * _LANES + lane]
                level = levels[row * _LANES + lane]
                energy += x * x
                cross += x * level
                level_energy += level * level
            lanes[0, lane] = energy
            lanes[1, lane] = cross
            lanes[2, lane] = level_energy
        for term in range(3):
            for lane in range(8):
                lanes[term, lane] += lanes[term, lane + 8]
            for lane in range(4):
                lanes[term, lane] += lanes[term, lane + 4]
            even = lanes[term, 0] + lanes[term, 2]
            sums[b, term] = even + (lanes[term, 1] + lanes[term, 3])
    return -1


def quantize_blocks(
    bits: NDArray[np.uint16] | NDArray[np.uint32],
    dtype: str,
    packed: NDArray[np.uint8],
    absmax: NDArray[np.float32],
    sums: NDArray[np.float32],
) -> int:
    """Rounds weights to the nearest NF4 level, block by block.

    Args:
        bits: the weights' bits, [n]: uint16 for "bfloat16" and "float16", uint32 for "float32".
        dtype: what the bits mean.
        packed: receives two codes a byte, [ceil(n / 2)].
        absmax: receives the scale of each block, [ceil(n / 64)].
        sums: receives per block the sums E of x^2, C of x * level and L of level^2, where x is
            w / absmax, [ceil(n / 64), 3]. With them the squared error for any scale s is known:
            absmax^2 E - 2 absmax s C + s^2 L. Being relative, they neither over- nor underflow.

    Returns:
        -1, or the index of the first block that holds an infinity or a NaN.
    """
    return int(_quantize_blocks(bits, dtype == "float16", packed, absmax, sums))


@njit(cache=True, nogil=True, error_model="numpy")
def _nested_quantize(absmax, codes, nested_absmax):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(absmax.size):
        total += np.float64(absmax[i])
    offset = np.float32(total / absmax.size)
    for g in range(nested_absmax.size):
        start = g * NESTED_BLOCK_SIZE
        stop = min(start + NESTED_BLOCK_SIZE, absmax.size)
        largest = _ZERO
        for i in range(start, stop):
            largest = max(largest, abs(absmax[i] - offset))
        nested_absmax[g] = largest
        inverse = _ONE / max(largest, _SMALLEST)
        for i in range(start, stop):
            x = (absmax[i] - offset) * inverse
            low = 0
            high = SCALE_MIDPOINTS.size
            while low < high:
                middle = (low + high) // 2
                if SCALE_MIDPOINTS[middle] < x:
                    low = middle + 1
                else:
                    high = middle
            codes[i] = low
    return offset


def nested_quantize(
    absmax: NDArray[np.float32],
    codes: NDArray[np.uint8],
    nested_absmax: NDArray[np.float32],
) -> np.float32:
    """Double quantization: see `pipeline.nf4.double_quant.double_quantize`, which calls this."""
    return np.float32(_nested_quantize(absmax, codes, nested_absmax))


@njit(cache=True, nogil=True, error_model="numpy")
def _squared_error(absmax, sums, scales):  # type: ignore[no-untyped-def]
    energy = 0.0
    error = 0.0
    for b in range(scales.size):
        a = np.float64(absmax[b])
        s = np.float64(scales[b])
        own = a * a * np.float64(sums[b, 0])
        both = a * s * np.float64(sums[b, 1])
        energy += own
        error += max(own - 2.0 * both + s * s * np.float64(sums[b, 2]), 0.0)
    return error, energy


def squared_error(
    absmax: NDArray[np.float32], sums: NDArray[np.float32], scales: NDArray[np.float32]
) -> tuple[float, float]:
    """The squared error of a tensor and its energy, summed block after block in float64.

    Args:
        absmax: what `quantize_blocks` left, [blocks].
        sums: what `quantize_blocks` left, [blocks, 3].
        scales: the scale that readers will use for each block, [blocks].

    Returns:
        (sum of (w - s * level)^2, sum of w^2).
    """
    error, energy = _squared_error(absmax, sums, scales)
    return float(error), float(energy)
