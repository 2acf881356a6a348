"""The loops of GPTQ, compiled for the CPU; see `nf4_pipeline.gptq` for what they compute.

Each releases the GIL and works on some rows. Everything is float32 in a fixed order, without fused
multiply-adds: the same on every processor.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.compiled import compiled
from nf4_pipeline.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE
from nf4_pipeline.nf4.codebook import (
    NF4_LEVELS,
    SCALE_LEVELS,
    SCALE_MIDPOINTS,
    ZERO_CODE,
)
from nf4_pipeline.nf4.nearest_level import nearest_code, nearest_scale_code

_SMALLEST: Final = np.float32(2.0**-126)  # the smallest normal number
_INFINITE: Final = np.float32(np.inf)
_ZERO: Final = np.float32(0.0)
_ONE: Final = np.float32(1.0)
_ZERO_LEVEL: Final = int(np.flatnonzero(SCALE_LEVELS == 0)[0])


@compiled(error_model="numpy")
def _start_scales(weights, first, columns, diagonal, candidates, signs, limits, scales):  # type: ignore[no-untyped-def]
    values = np.zeros(BLOCK_SIZE, np.float32)
    weighting = np.zeros(BLOCK_SIZE, np.float32)
    errors = np.zeros(BLOCK_SIZE, np.float32)
    for b in range(scales.size):
        start = b * BLOCK_SIZE
        count = min(BLOCK_SIZE, weights.size - start)
        column = (first + start) % columns
        top = _ZERO
        for i in range(BLOCK_SIZE):
            values[i] = weights[start + i] if i < count else _ZERO
            weighting[i] = diagonal[column] if i < count else _ZERO
            column = column + 1 if column + 1 < columns else 0
            top = max(top, abs(values[i]))
        best = _INFINITE
        limit = limits[b]
        scales[b] = min(top, limit)
        if top < _SMALLEST:
            continue
        for candidate in range(signs * candidates.size):
            scale = min(top * candidates[candidate % candidates.size], limit)
            if candidate >= candidates.size:
                scale = -scale
            inverse = _ONE / scale
            for i in range(BLOCK_SIZE):
                off = values[i] - scale * NF4_LEVELS[nearest_code(values[i] * inverse)]
                errors[i] = weighting[i] * off * off
            total = _ZERO
            for i in range(BLOCK_SIZE):
                total += errors[i]
            if total < best:
                best = total
                scales[b] = scale


def start_scales(
    weights: NDArray[np.float32],
    first: int,
    columns: int,
    diagonal: NDArray[np.float32],
    candidates: NDArray[np.float32],
    signs: int,
    limits: NDArray[np.float32],
    scales: NDArray[np.float32],
) -> None:
    """The scale of each block for which the weighted error of plain rounding is least.

    Args:
        weights: consecutive weights of a matrix, row after row, float32 [n].
        first: the place of the first one in the whole; a multiple of 64.
        columns: of the matrix.
        diagonal: the mean square of each input, float32 [columns].
        candidates: scales that are tried, as shares of the largest weight of a block; float32.
        signs: 2 to try the negative ones, too; else 1.
        limits: what no scale may be beyond, see `scale_limits`; float32 [ceil(n / 64)].
        scales: receives the scales, of either sign, float32 [ceil(n / 64)].
    """
    _start_scales(weights, first, columns, diagonal, candidates, signs, limits, scales)


def nested_absmax(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest magnitude among 256 consecutive scales, float32 [ceil(blocks / 256)]."""
    starts = np.arange(0, scales.size, NESTED_BLOCK_SIZE)
    return np.maximum.reduceat(np.abs(scales), starts).astype(np.float32)


@compiled(error_model="numpy")
def _scale_code(scale, nested, limit):  # type: ignore[no-untyped-def]
    """The stored level nearest to a scale, or the next one within the limit.

    Level zero only if its neighbour is beyond the limit, too.
    """
    scale = min(max(scale, -limit), limit)
    x = scale / max(nested, _SMALLEST)
    code = nearest_scale_code(x, 0, SCALE_MIDPOINTS.size)
    if abs(SCALE_LEVELS[code] * nested) > limit:
        code += -1 if code > _ZERO_LEVEL else 1
    if code == _ZERO_LEVEL:
        code = _ZERO_LEVEL + 1 if scale >= _ZERO else _ZERO_LEVEL - 1
        if abs(SCALE_LEVELS[code] * nested) > limit:
            code = _ZERO_LEVEL
    return code


@compiled(error_model="numpy")
def _try_scale(values, factor, start, scale, bound, errors, codes):  # type: ignore[no-untyped-def]
    """Rounds 64 columns of one row with a scale; gives up beyond `bound`, and returns the cost."""
    inverse = _ONE / scale
    cost = _ZERO
    for j in range(BLOCK_SIZE):
        code = nearest_code(values[j] * inverse)
        error = (values[j] - scale * NF4_LEVELS[code]) / factor[start + j, start + j]
        cost += error * error
        if cost >= bound:
            return cost
        codes[j] = code
        errors[j] = error
        following = factor[start + j, start : start + BLOCK_SIZE]
        for k in range(j + 1, BLOCK_SIZE):
            values[k] -= error * following[k]
    return cost


@compiled(error_model="numpy")
def _round_to_zero(values, factor, start, errors):  # type: ignore[no-untyped-def]
    """Rounds 64 columns of one row to zero, and returns the cost."""
    cost = _ZERO
    for j in range(BLOCK_SIZE):
        error = values[j] / factor[start + j, start + j]
        cost += error * error
        errors[j] = error
        following = factor[start + j, start : start + BLOCK_SIZE]
        for k in range(j + 1, BLOCK_SIZE):
            values[k] -= error * following[k]
    return cost


@compiled()
def _propagate(weights, factor, errors, start):  # type: ignore[no-untyped-def]
    """What 64 columns lost is taken off all columns behind them."""
    rows, columns = weights.shape
    end = start + BLOCK_SIZE
    for r in range(rows):
        for j in range(0, BLOCK_SIZE, 4):
            e0, e1, e2, e3 = errors[r, j], errors[r, j + 1], errors[r, j + 2], errors[r, j + 3]
            f0, f1 = factor[start + j], factor[start + j + 1]
            f2, f3 = factor[start + j + 2], factor[start + j + 3]
            for k in range(end, columns):
                weights[r, k] -= e0 * f0[k] + e1 * f1[k] + e2 * f2[k] + e3 * f3[k]


@compiled(error_model="numpy")
def _round_rows(  # type: ignore[no-untyped-def]
    weights, factor, blocks, first, scales, limits, nested, candidates, signs, codes, scale_codes
):
    rows, columns = weights.shape
    per_row = columns // BLOCK_SIZE
    values = np.zeros(BLOCK_SIZE, np.float32)
    errors = np.zeros((rows, BLOCK_SIZE), np.float32)
    tried = np.zeros(BLOCK_SIZE, np.float32)
    trial = np.zeros(BLOCK_SIZE, np.uint8)
    total = np.float64(0.0)
    for place in range(per_row):
        start, block = place * BLOCK_SIZE, blocks[place]
        for r in range(rows):
            largest = nested[((first + r) * per_row + block) // NESTED_BLOCK_SIZE]
            top = _ZERO
            for i in range(start, start + BLOCK_SIZE):
                top = max(top, abs(weights[r, i]))
            limit = limits[r, block]
            begin = _scale_code(scales[r, block], largest, limit)
            sign = _ONE if scales[r, block] >= _ZERO else -_ONE
            best = _INFINITE
            last = -1
            for candidate in range(signs * candidates.size + 1):
                code = begin
                if candidate > 0:
                    # Those of the sign that plain rounding wants come first: they end the others.
                    share = candidates[(candidate - 1) % candidates.size]
                    wanted = sign if candidate <= candidates.size else -sign
                    code = _scale_code(wanted * share * top, largest, limit)
                    if code == last or code == begin:
                        continue
                last = code
                scale = SCALE_LEVELS[code] * largest
                if abs(scale) < _SMALLEST:
                    continue
                values[:] = weights[r, start : start + BLOCK_SIZE]
                cost = _try_scale(values, factor, start, scale, best, tried, trial)
                if cost < best:
                    best = cost
                    scale_codes[r, block] = code
                    errors[r] = tried
                    codes[r, start : start + BLOCK_SIZE] = trial
            if best == _INFINITE:  # no scale to speak of: all is lost, and passed on
                scale_codes[r, block] = _ZERO_LEVEL
                codes[r, start : start + BLOCK_SIZE] = ZERO_CODE
                values[:] = weights[r, start : start + BLOCK_SIZE]
                best = _round_to_zero(values, factor, start, errors[r])
            total += best
        _propagate(weights, factor, errors, start)
    return total


def round_rows(
    weights: NDArray[np.float32],
    factor: NDArray[np.float32],
    blocks: NDArray[np.int64],
    first: int,
    scales: NDArray[np.float32],
    limits: NDArray[np.float32],
    nested: NDArray[np.float32],
    candidates: NDArray[np.float32],
    signs: int,
    codes: NDArray[np.uint8],
    scale_codes: NDArray[np.uint8],
) -> float:
    """Rounds rows of a matrix whose rows are whole blocks of 64, and chooses their scales.

    Args:
        weights: float32 [rows, columns], columns in the order of the factor, which keeps blocks
            together; destroyed.
        factor: U, upper triangular, float32 [columns, columns].
        blocks: which block of the row stands at each place of that order, int64 [columns / 64].
        first: the number of the first of these rows in the matrix.
        scales: what `start_scales` chose, blocks in the matrix's order, float32 [rows, blocks].
        limits: what no scale may be beyond, likewise; see `scale_limits`.
        nested: of the whole matrix, see `nested_absmax`.
        candidates: scales that are tried besides, as shares of the largest weight that is left
            in a block; float32.
        signs: 2 to try the negative ones, too; else 1.
        codes: receives the codes in the order of the factor, [rows, columns].
        scale_codes: receives the scales' 8-bit codes in the matrix's order, [rows, blocks].

    Returns:
        What it costs: the sum of all e_j^2; not finite if that is more than float32 holds.
    """
    cost = _round_rows(
        weights, factor, blocks, first, scales, limits, nested, candidates, signs, codes,
        scale_codes,
    )  # fmt: skip
    return float(cost)


@compiled(error_model="numpy")
def _round_ragged(weights, factor, order, first, scales, codes):  # type: ignore[no-untyped-def]
    rows, columns = weights.shape
    total = 0.0
    for r in range(rows):
        values = weights[r]
        for j in range(columns):
            scale = scales[((first + r) * columns + order[j]) // BLOCK_SIZE]
            kept = _ZERO
            code = np.int32(ZERO_CODE)
            if abs(scale) >= _SMALLEST:
                code = nearest_code(values[j] / scale)
                kept = scale * NF4_LEVELS[code]
            error = (values[j] - kept) / factor[j, j]
            codes[r, j] = code
            total += error * error
            for k in range(j + 1, columns):
                values[k] -= error * factor[j, k]
    return total


def round_ragged(
    weights: NDArray[np.float32],
    factor: NDArray[np.float32],
    order: NDArray[np.int64],
    first: int,
    scales: NDArray[np.float32],
    codes: NDArray[np.uint8],
) -> float:
    """Rounds rows of a matrix in which blocks of 64 run on from row to row; the scales are given.

    Args:
        weights: float32 [rows, columns], columns in the order of the factor; destroyed.
        factor: U, upper triangular, float32 [columns, columns].
        order: the column that stands at each place of that order, int64 [columns].
        first: the number of the first of these rows in the matrix.
        scales: of the whole matrix as readers will compute them, float32 [blocks].
        codes: receives the codes in the order of the factor, [rows, columns].

    Returns:
        What it costs: the sum of all e_j^2.
    """
    return float(_round_ragged(weights, factor, order, first, scales, codes))


@compiled()
def _scale_codes(scales, nested, limits, codes):  # type: ignore[no-untyped-def]
    for b in range(scales.size):
        codes[b] = _scale_code(scales[b], nested[b // NESTED_BLOCK_SIZE], limits[b])


def scale_codes(
    scales: NDArray[np.float32], nested: NDArray[np.float32], limits: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """See `_scale_code`: uint8 [blocks]."""
    codes: NDArray[np.uint8] = np.empty(scales.size, np.uint8)
    _scale_codes(scales, nested, limits, codes)
    return codes


@compiled(error_model="numpy")
def _block_errors(values, packed, scales, sums):  # type: ignore[no-untyped-def]
    for b in range(scales.size):
        error = 0.0
        energy = 0.0
        for i in range(b * BLOCK_SIZE, min((b + 1) * BLOCK_SIZE, values.size)):
            pair = np.int64(packed[i // 2])
            code = pair >> 4 if i % 2 == 0 else pair & 15
            off = np.float64(values[i]) - np.float64(scales[b] * NF4_LEVELS[code])
            error += off * off
            energy += np.float64(values[i]) * np.float64(values[i])
        sums[b, 0] = error
        sums[b, 1] = energy


def block_errors(
    values: NDArray[np.float32],
    packed: NDArray[np.uint8],
    scales: NDArray[np.float32],
    sums: NDArray[np.float64],
) -> None:
    """What codes that are given lose, block by block.

    Args:
        values: consecutive weights, float32 [n].
        packed: their codes, two a byte, [ceil(n / 2)].
        scales: as readers compute them, float32 [ceil(n / 64)].
        sums: receives sum (w - s level)^2 and sum w^2 of each block, float64 [ceil(n / 64), 2].
    """
    _block_errors(values, packed, scales, sums)
