"""The levels, bit for bit as bitsandbytes has them, and the rule that picks one."""

from __future__ import annotations

import numpy as np
from bitsandbytes import functional as stock
from nf4_pipeline.nf4.codebook import (
    NF4_LEVELS,
    NF4_MIDPOINTS,
    SCALE_LEVELS,
    SCALE_MIDPOINTS,
    ZERO_CODE,
    dynamic_levels,
    midpoints,
)


def test_the_16_levels_are_those_of_bitsandbytes() -> None:
    expected = stock.get_4bit_type("nf4", device="cpu").numpy()
    assert NF4_LEVELS.dtype == np.float32
    assert NF4_LEVELS.tobytes() == expected.tobytes()


def test_the_256_scale_levels_are_those_of_bitsandbytes() -> None:
    expected = stock.create_dynamic_map().numpy()
    assert SCALE_LEVELS.dtype == np.float32
    assert SCALE_LEVELS.tobytes() == expected.tobytes()
    assert dynamic_levels().tobytes() == expected.tobytes()


def test_levels_ascend_and_hold_zero_and_one_once() -> None:
    for levels in (NF4_LEVELS, SCALE_LEVELS):
        assert (np.diff(levels) > 0).all()
        assert levels[-1] == 1.0
        assert (levels == 0.0).sum() == 1
    assert NF4_LEVELS[ZERO_CODE] == 0.0


def test_midpoints_are_halfway_in_float32() -> None:
    for levels, found in ((NF4_LEVELS, NF4_MIDPOINTS), (SCALE_LEVELS, SCALE_MIDPOINTS)):
        assert found.dtype == np.float32
        assert found.size == levels.size - 1
        assert (levels[:-1] < found).all()
        assert (found < levels[1:]).all()
        # The sum is rounded once; halving it is exact.
        sums = (levels[:-1].astype(np.float64) + levels[1:].astype(np.float64)).astype(np.float32)
        assert (found == sums / 2).all()
    assert midpoints(np.array([0.0, 1.0], np.float32)).tolist() == [0.5]
