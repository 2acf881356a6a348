"""Calibrated rounding a second time: plain NumPy in float64, straight from its definition.

Columns are eliminated from inverse(H) one by one, as in Optimal Brain Surgeon; there is no Cholesky
factor here, and no search by bisection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from nf4_pipeline.nf4.codebook import NF4_LEVELS, SCALE_LEVELS
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEVELS: Final[Array] = NF4_LEVELS.astype(np.float64)
SCALES: Final[Array] = SCALE_LEVELS.astype(np.float64)
GRID: Final[Array] = np.linspace(0.70, 1.15, 24)
ZERO: Final = int(np.flatnonzero(SCALES == 0)[0])


@dataclass(frozen=True)
class Expected:
    """What the definition gives.

    Attributes:
        codes: [rows, columns], columns as they stand.
        scales: the scales' 8-bit codes, in the order of the blocks.
        nested: the largest scale of each 256.
        cost: sum of e_j^2.
    """

    codes: NDArray[np.int64]
    scales: NDArray[np.int64]
    nested: Array
    cost: float


def prepared(moment: Array, tokens: int, shrink: float = 0.1, damping: float = 0.01) -> Array:
    """H: off-diagonals shrunk, the diagonal damped."""
    columns = len(moment)
    h = moment * (1 - min(shrink, columns / tokens))
    diagonal = np.diag(moment)
    h[np.diag_indices(columns)] = diagonal + damping * diagonal.mean()
    return h


def order_of(h: Array) -> NDArray[np.int64]:
    """Blocks by what their columns matter together, columns in them by what they matter."""
    diagonal = np.diag(h)
    if len(h) % 64:
        return np.array(sorted(range(len(h)), key=lambda j: -diagonal[j]))
    blocks = sorted(range(len(h) // 64), key=lambda b: -diagonal[64 * b : 64 * b + 64].sum())
    return np.array(
        [j for b in blocks for j in sorted(range(64 * b, 64 * b + 64), key=lambda j: -diagonal[j])]
    )


def nearest(values: Array | float, levels: Array) -> NDArray[np.int64]:
    """The number of midpoints below each value."""
    middles = (levels[1:] + levels[:-1]) / 2
    found: NDArray[np.int64] = np.searchsorted(middles, values, side="left")
    return found


def scale_code(scale: float, largest: float, limit: float) -> int:
    """The nearest stored level within the limit, and a neighbour of zero where it would be zero."""
    code = int(nearest(np.clip(scale, -limit, limit) / largest, SCALES))
    if abs(SCALES[code] * largest) > limit:
        code += -1 if code > ZERO else 1
    if code == ZERO:
        return ZERO + 1 if scale >= 0 else ZERO - 1
    return code


def largest_of(weights: Array) -> Array:
    """The largest weight of each block, or a twentieth of the mean block's, if that is more."""
    flat = np.abs(weights).reshape(-1)
    largest = np.array([flat[first : first + 64].max() for first in range(0, flat.size, 64)])
    found: Array = np.maximum(largest, 0.05 * largest.mean())
    return found


def start_scales(weights: Array, h: Array) -> Array:
    """The scale of each block for which the weighted error of plain rounding is least."""
    matter = np.tile(np.diag(h), len(weights))
    flat = weights.reshape(-1)
    found = []
    for first in range(0, flat.size, 64):
        w, m = flat[first : first + 64], matter[first : first + 64]
        tried = np.abs(w).max() * np.concatenate([GRID, -GRID])
        errors = [float((m * (w - s * LEVELS[nearest(w / s, LEVELS)]) ** 2).sum()) for s in tried]
        found.append(tried[int(np.argmin(errors))])
    return np.array(found)


def reference(weights: Array, h: Array) -> Expected:
    """The whole recipe.

    Args:
        weights: [rows, columns], none of its blocks zero.
        h: see `prepared`.
    """
    rows, columns = weights.shape
    start = start_scales(weights, h)
    nested = np.array([np.abs(start[g : g + 256]).max() for g in range(0, start.size, 256)])
    limits = 2.0 * largest_of(weights)
    scales = np.array([scale_code(s, nested[b // 256], limits[b]) for b, s in enumerate(start)])
    codes = np.zeros((rows, columns), np.int64)
    order = order_of(h)
    lines = _eliminated(h[np.ix_(order, order)])
    left = weights[:, order].copy()
    step = 64 if columns % 64 == 0 else 1
    cost = 0.0
    for first in range(0, columns, step):
        for row in range(rows):
            block = (row * columns + order[first]) // 64
            largest = nested[block // 256]
            tried = [int(scales[block])]
            if step == 64:
                top = np.abs(left[row, first : first + 64]).max()
                signed = GRID if start[block] >= 0 else -GRID
                wanted = top * np.concatenate([signed, -signed])
                tried += [scale_code(scale, largest, limits[block]) for scale in wanted]
            tried = list(dict.fromkeys(tried))
            trials = [_round(left[row], SCALES[c] * largest, lines, first, step) for c in tried]
            number = int(np.argmin([trial.cost for trial in trials]))
            scales[block] = tried[number]
            left[row] = trials[number].left
            codes[row, order[first : first + step]] = trials[number].codes
            cost += trials[number].cost
    return Expected(codes, scales, nested, cost)


@dataclass(frozen=True)
class _Trial:
    """Columns of one row, rounded with one scale."""

    left: Array
    codes: NDArray[np.int64]
    cost: float


def _round(line: Array, scale: float, lines: Array, first: int, step: int) -> _Trial:
    left, cost = line.copy(), 0.0
    codes = np.zeros(step, np.int64)
    for j in range(first, first + step):
        code = int(nearest(left[j] / scale, LEVELS))
        off = left[j] - scale * LEVELS[code]
        cost += off**2 / lines[j, j]
        left[j:] -= off / lines[j, j] * lines[j, j:]
        codes[j - first] = code
    return _Trial(left, codes, cost)


def _eliminated(h: Array) -> Array:
    """Row j: that of column j in the inverse of H without the columns before it."""
    inverse = np.linalg.inv(h)
    lines = np.zeros_like(inverse)
    for j in range(len(h)):
        lines[j] = inverse[j]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return lines
