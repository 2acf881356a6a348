"""Compiled CPU kernels (numba). Each releases the GIL and works on one chunk; threads run chunks.

The arithmetic is that of `bitsandbytes.functional.quantize_4bit` on a CPU (0.50), bit for bit:

    absmax = max |w| over a block of 64                              (float32)
    x      = w * (1 / max(absmax, 1e-38))                            (float32, whole blocks)
    x      = w / max(absmax, 1e-38), and that maximum is stored      (a ragged last block)
    code   = number of midpoints strictly below x

Two codes share a byte, the earlier weight in the high half. Work goes through tiles of 16 blocks
that stay in the processor's nearest cache, one simple loop after the other: LLVM turns each of them
into vector instructions, which it does not do with one loop that does everything.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.compiled import compiled
from nf4_pipeline.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE
from nf4_pipeline.nf4.codebook import SCALE_LEVELS, SCALE_MIDPOINTS
from nf4_pipeline.nf4.nearest_level import level_of, nearest_code, nearest_scale_code

_SMALLEST: Final = np.float32(1e-38)  # keeps 1 / absmax finite for a block of zeros
_ZERO: Final = np.float32(0.0)
_HALF: Final = np.float32(0.5)
_ONE: Final = np.float32(1.0)
# float16 bits shifted into a float32's place are 2**112 too small; the product is exact.
_HALF_SCALE: Final = np.float32(2.0**112)
_TILE_BLOCKS: Final = 16
_TILE: Final = _TILE_BLOCKS * BLOCK_SIZE

# Fixed point for the sums: 64 products of these stay below 2**31, and integers add up to the same
# number in any order. A rounding error d is at most 0.139, half the widest gap between levels.
_ERROR_UNIT: Final = np.float32(2.0**15)
_LEVEL_UNIT: Final = np.float32(2.0**12)

# Where the search among the 255 midpoints between scale levels begins, for each cell of [-1, 1];
# the margins on both sides hold what rounding may do to a value at a cell's edge.
_CELLS_PER_UNIT: Final = np.float32(2048.0)
_FIRST_MIDPOINT: Final = np.searchsorted(
    SCALE_MIDPOINTS, (np.arange(4096 + 4, dtype=np.float64) - 1.0) / 2048.0 - 1.0
).astype(np.int16)
_MIDPOINTS: Final = np.append(SCALE_MIDPOINTS, np.float32(np.inf))  # nothing lies above the last


@compiled()
def _widen(bits, half, out):  # type: ignore[no-untyped-def]
    """The bits of weights -> float32 bits, exact; `half` says that they are float16."""
    if bits.itemsize == 4:
        for i in range(bits.size):
            out[i] = bits[i]
    elif not half:
        for i in range(bits.size):
            out[i] = np.uint32(bits[i]) << np.uint32(16)
    else:
        values = out.view(np.float32)
        for i in range(bits.size):
            out[i] = (np.uint32(bits[i]) & np.uint32(0x7FFF)) << np.uint32(13)
        for i in range(bits.size):
            special = np.uint32(0x7F800000) if out[i] >= np.uint32(0x0F800000) else np.uint32(0)
            values[i] *= _HALF_SCALE
            out[i] |= special
        for i in range(bits.size):
            out[i] |= (np.uint32(bits[i]) & np.uint32(0x8000)) << np.uint32(16)


@compiled()
def _largest(bits, top):  # type: ignore[no-untyped-def]
    """The largest magnitude of each block, as float32 bits.

    Without the sign, the order of the bits is the order of the magnitudes, and a NaN comes out
    above infinity instead of vanishing in a comparison.
    """
    for b in range(top.size):
        largest = np.uint32(0)
        block = bits[b * BLOCK_SIZE : (b + 1) * BLOCK_SIZE]
        for i in range(BLOCK_SIZE):
            magnitude = block[i] & np.uint32(0x7FFFFFFF)
            largest = magnitude if magnitude > largest else largest
        top[b] = largest


@compiled(error_model="numpy")
def _scale(weights, absmax, ragged, x):  # type: ignore[no-untyped-def]
    """x = w / absmax for the blocks of a tile; a ragged last block stores the maximum it used."""
    whole = absmax.size - 1 if ragged else absmax.size
    for b in range(whole):
        inverse = _ONE / max(absmax[b], _SMALLEST)
        block = weights[b * BLOCK_SIZE : (b + 1) * BLOCK_SIZE]
        scaled = x[b * BLOCK_SIZE : (b + 1) * BLOCK_SIZE]
        for i in range(BLOCK_SIZE):
            scaled[i] = block[i] * inverse
    if ragged:
        absmax[whole] = max(absmax[whole], _SMALLEST)
        for i in range(whole * BLOCK_SIZE, (whole + 1) * BLOCK_SIZE):
            x[i] = weights[i] / absmax[whole]


@compiled()
def _choose(x, codes):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        codes[i] = nearest_code(x[i])


@compiled()
def _pack(codes, packed):  # type: ignore[no-untyped-def]
    for i in range(packed.size):
        packed[i] = np.uint8(codes[2 * i] << 4 | codes[2 * i + 1])


@compiled()
def _sum_up(x, codes, levels, sums):  # type: ignore[no-untyped-def]
    """Sums of d^2, d * level and level^2 per block in fixed point, where d = x - level."""
    for i in range(x.size):
        levels[i] = level_of(codes[i])
    for b in range(len(sums)):
        values = x[b * BLOCK_SIZE : (b + 1) * BLOCK_SIZE]
        chosen = levels[b * BLOCK_SIZE : (b + 1) * BLOCK_SIZE]
        own = np.int32(0)
        cross = np.int32(0)
        level = np.int32(0)
        for i in range(BLOCK_SIZE):
            d = np.int32(np.floor((values[i] - chosen[i]) * _ERROR_UNIT + _HALF))
            v = np.int32(np.floor(chosen[i] * _LEVEL_UNIT + _HALF))
            own = np.int32(own + d * d)
            cross = np.int32(cross + d * v)
            level = np.int32(level + v * v)
        sums[b, 0] = own
        sums[b, 1] = cross
        sums[b, 2] = level


@compiled(error_model="numpy")
def _quantize(bits, half, packed, absmax, sums):  # type: ignore[no-untyped-def]
    tile_bits = np.zeros(_TILE, np.uint32)
    tile = tile_bits.view(np.float32)
    top_bits = np.zeros(_TILE_BLOCKS, np.uint32)
    top = top_bits.view(np.float32)
    x = np.zeros(_TILE, np.float32)
    codes = np.zeros(_TILE, np.int32)
    levels = np.zeros(_TILE, np.float32)
    pairs = np.zeros(_TILE // 2, np.uint8)
    for first in range(0, absmax.size, _TILE_BLOCKS):
        blocks = min(_TILE_BLOCKS, absmax.size - first)
        start = first * BLOCK_SIZE
        count = min(bits.size - start, _TILE)
        padded = blocks * BLOCK_SIZE
        ragged = count < padded
        if ragged:
            # Zero weights fill a ragged block: their code is the padding that bitsandbytes writes
            # into the last byte, and they add nothing to the sums.
            tile_bits[count:padded] = 0
        _widen(bits[start : start + count], half, tile_bits)
        _largest(tile_bits, top_bits[:blocks])
        for b in range(blocks):
            if top_bits[b] >= np.uint32(0x7F800000):
                return first + b
        _scale(tile, top[:blocks], ragged, x)
        absmax[first : first + blocks] = top[:blocks]
        place = packed[start // 2 : start // 2 + (count + 1) // 2]
        _choose(x[:padded], codes)
        _pack(codes, pairs[: padded // 2])
        place[:] = pairs[: place.size]
        _sum_up(x[:padded], codes, levels, sums[first : first + blocks])
    return -1


def quantize_blocks(
    bits: NDArray[Any],
    dtype: str,
    packed: NDArray[np.uint8],
    absmax: NDArray[np.float32],
    sums: NDArray[np.int32],
) -> int | None:
    """Rounds weights to the nearest NF4 level, block by block.

    Args:
        bits: the weights' bits, [n]: uint16 for "bfloat16" and "float16", uint32 for "float32".
        dtype: what the bits mean.
        packed: receives two codes a byte, [ceil(n / 2)].
        absmax: receives the scale of each block, [ceil(n / 64)].
        sums: receives what `squared_error` needs, [ceil(n / 64), 3]: per block the sums of d^2,
            d * level and level^2 in fixed point, where d = w / absmax - level.

    Returns:
        None, or the index of the first block that holds an infinity or a NaN.
    """
    not_finite = int(_quantize(bits, dtype == "float16", packed, absmax, sums))
    return None if not_finite < 0 else not_finite


@compiled()
def _largest_magnitude(bits):  # type: ignore[no-untyped-def]
    """As `_largest`, of one group of any size."""
    largest = np.uint32(0)
    for i in range(bits.size):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        largest = magnitude if magnitude > largest else largest
    return largest


@compiled()
def _choose_scales(x, codes):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        # A table narrows the search to the midpoints that lie near x: rarely more than one.
        cell = np.int64((x[i] + _ONE) * _CELLS_PER_UNIT)
        low = np.int64(_FIRST_MIDPOINT[cell])
        high = np.int64(_FIRST_MIDPOINT[cell + 3])
        if high - low > 1:
            codes[i] = nearest_scale_code(x[i], low, high)
        else:
            codes[i] = low + (_MIDPOINTS[low] < x[i])


@compiled(error_model="numpy")
def _nested_quantize(absmax, codes, nested_absmax):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(absmax.size):
        total += np.float64(absmax[i])
    offset = np.float32(total / absmax.size)
    group = np.empty(NESTED_BLOCK_SIZE, np.float32)
    for g in range(nested_absmax.size):
        scales = absmax[g * NESTED_BLOCK_SIZE : (g + 1) * NESTED_BLOCK_SIZE]
        x = group[: scales.size]
        for i in range(scales.size):
            x[i] = scales[i] - offset
        nested_absmax.view(np.uint32)[g] = _largest_magnitude(x.view(np.uint32))
        inverse = _ONE / max(nested_absmax[g], _SMALLEST)
        for i in range(x.size):
            x[i] *= inverse
        _choose_scales(x, codes[g * NESTED_BLOCK_SIZE : (g + 1) * NESTED_BLOCK_SIZE])
    return offset


def nested_quantize(
    absmax: NDArray[np.float32],
    codes: NDArray[np.uint8],
    nested_absmax: NDArray[np.float32],
) -> np.float32:
    """Double quantization: see `nf4.double_quant.double_quantize`, which calls this."""
    return np.float32(_nested_quantize(absmax, codes, nested_absmax))


@compiled()
def _nested_dequantize(codes, nested_absmax, offset, scales):  # type: ignore[no-untyped-def]
    for g in range(nested_absmax.size):
        chosen = codes[g * NESTED_BLOCK_SIZE : (g + 1) * NESTED_BLOCK_SIZE]
        out = scales[g * NESTED_BLOCK_SIZE : (g + 1) * NESTED_BLOCK_SIZE]
        for i in range(chosen.size):
            out[i] = SCALE_LEVELS[chosen[i]] * nested_absmax[g]
        for i in range(chosen.size):
            out[i] += offset


def nested_dequantize(
    codes: NDArray[np.uint8],
    nested_absmax: NDArray[np.float32],
    offset: np.float32,
    scales: NDArray[np.float32],
) -> None:
    """`level[code] * nested_absmax + offset`, each step rounded to float32, into `scales`."""
    _nested_dequantize(codes, nested_absmax, offset, scales)


@compiled(error_model="numpy")
def _squared_error(absmax, sums, scales):  # type: ignore[no-untyped-def]
    own_unit = 1.0 / (np.float64(_ERROR_UNIT) * np.float64(_ERROR_UNIT))
    cross_unit = 1.0 / (np.float64(_ERROR_UNIT) * np.float64(_LEVEL_UNIT))
    level_unit = 1.0 / (np.float64(_LEVEL_UNIT) * np.float64(_LEVEL_UNIT))
    energy = 0.0
    error = 0.0
    for b in range(scales.size):
        a = np.float64(absmax[b])
        shift = a - np.float64(scales[b])
        own = sums[b, 0] * own_unit
        cross = sums[b, 1] * cross_unit
        level = sums[b, 2] * level_unit
        energy += a * a * (own + 2.0 * cross + level)
        error += max(a * a * own + 2.0 * a * shift * cross + shift * shift * level, 0.0)
    return error, energy


def squared_error(
    absmax: NDArray[np.float32], sums: NDArray[np.int32], scales: NDArray[np.float32]
) -> tuple[float, float]:
    """The squared error of a tensor and its energy, summed block after block in float64.

    With w = absmax (d + level), the error for a scale s is absmax d + (absmax - s) level. The sums'
    fixed point leaves four digits of the error's root.

    Args:
        absmax: what `quantize_blocks` left, [blocks].
        sums: what `quantize_blocks` left, [blocks, 3].
        scales: the scale that readers will use for each block, [blocks].

    Returns:
        (sum of (w - s * level)^2, sum of w^2).
    """
    error, energy = _squared_error(absmax, sums, scales)
    return float(error), float(energy)
