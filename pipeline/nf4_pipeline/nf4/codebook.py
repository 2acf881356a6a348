"""The levels that 4-bit codes and 8-bit scales stand for, and the midpoints between them.

Choosing a level is the same rule for both: a value takes the level whose index is the number of
midpoints strictly below it. So a value that lies exactly on a midpoint takes the lower level.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

# The quantiles of a standard normal, scaled to [-1, 1], with an exact zero: QLoRA (Dettmers et al.,
# 2023, arXiv:2305.14314, appendix E). The digits are those that bitsandbytes stores.
NF4_LEVELS: Final[NDArray[np.float32]] = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)

ZERO_CODE: Final = 7
"""The code of the level 0.0; it pads the last byte of a tensor with an odd number of weights."""


def dynamic_levels() -> NDArray[np.float32]:
    """The 256 signed levels for 8-bit scales ("dynamic tree" type).

    Seven decades, 10**-6 to 1. Decade `i` holds 2**i levels of each sign: the centres of 2**i equal
    parts of [0.1, 1], scaled. Zero and one complete the 256. Source: Dettmers,
    "8-Bit Approximations for Parallelism in Deep Learning" (arXiv:1511.04561).

    Returns:
        float32 [256], ascending.
    """
    levels: list[float] = [0.0, 1.0]
    for decade in range(7):
        edges = _linspace_f32(2**decade + 1)
        centres = (edges[:-1] + edges[1:]) / np.float32(2.0)
        # The product is taken in float32, as bitsandbytes takes it, so that no bit differs.
        scaled = np.float32(10.0 ** (decade - 6)) * centres
        levels += [float(value) for value in scaled]
        levels += [-float(value) for value in scaled]
    return np.array(sorted(levels), dtype=np.float32)


def _linspace_f32(points: int) -> NDArray[np.float32]:
    """[0.1, 1] in equal float32 steps, counted from both ends, each point rounded once.

    torch.linspace counts so, with a fused multiply-add; float64 holds the product and the sum
    closely enough that one rounding at the end gives the same bits.
    """
    start, stop = np.float32(0.1), np.float32(1.0)
    step = np.float64((stop - start) / np.float32(points - 1))
    index = np.arange(points, dtype=np.float64)
    from_start = np.float64(start) + step * index
    from_stop = np.float64(stop) - step * (points - 1 - index)
    return np.where(index < points // 2, from_start, from_stop).astype(np.float32)


def midpoints(levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The thresholds between neighbouring levels, in float32: [n] -> [n - 1]."""
    return ((levels[:-1] + levels[1:]) / np.float32(2.0)).astype(np.float32)


SCALE_LEVELS: Final[NDArray[np.float32]] = dynamic_levels()
NF4_MIDPOINTS: Final[NDArray[np.float32]] = midpoints(NF4_LEVELS)
SCALE_MIDPOINTS: Final[NDArray[np.float32]] = midpoints(SCALE_LEVELS)
