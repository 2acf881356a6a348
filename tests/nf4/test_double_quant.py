"""Double quantization: the written rule, derived again in NumPy, and its distance from stock."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bitsandbytes import functional as stock
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from nf4_pipeline.nf4.codebook import SCALE_LEVELS, SCALE_MIDPOINTS
from nf4_pipeline.nf4.dequantize import dequantize
from nf4_pipeline.nf4.double_quant import NestedScales, double_quantize
from numpy.typing import NDArray

Scales = NDArray[np.float32]


def rederived(absmax: Scales) -> NestedScales:
    """The rule of `double_quant.py`, in steps that share nothing with the compiled kernel."""
    total = 0.0
    for value in absmax.tolist():  # float64, from the first to the last
        total += value
    offset = np.float32(total / absmax.size)
    codes, nested = [], []
    for start in range(0, absmax.size, 256):
        v = (absmax[start : start + 256] - offset).astype(np.float32)
        largest = np.abs(v).max()
        x = v * (np.float32(1) / np.maximum(largest, np.float32(1e-38)))
        nested.append(largest)
        codes.append(np.searchsorted(SCALE_MIDPOINTS, x, side="left"))
    return NestedScales(np.concatenate(codes).astype(np.uint8), np.array(nested, "f4"), offset)


def check(absmax: Scales) -> NestedScales:
    found, expected = double_quantize(absmax), rederived(absmax)
    assert found.offset.tobytes() == expected.offset.tobytes()
    assert found.absmax.tobytes() == expected.absmax.tobytes()
    assert found.codes.tobytes() == expected.codes.tobytes()
    return found


@pytest.mark.parametrize("blocks", [1, 2, 3, 255, 256, 257, 512, 1000, 5000])
def test_the_written_rule(blocks: int) -> None:
    dice = np.random.default_rng(blocks)
    check(np.abs(dice.normal(0.05, 0.01, blocks)).astype(np.float32))
    check(np.exp(dice.normal(0, 5, blocks)).astype(np.float32))


@given(st.lists(st.floats(0, 2.0**120, width=32, allow_subnormal=True), min_size=1, max_size=600))
@limits(max_examples=300)
def test_the_written_rule_for_any_scales(values: list[float]) -> None:
    check(np.array(values, np.float32))


def test_equal_scales_come_back_exactly() -> None:
    for value in (0.0, 0.1, 3.5):
        absmax = np.full(300, np.float32(value))
        assert check(absmax).scales().tobytes() == absmax.tobytes()


def test_the_mean_is_summed_in_float64() -> None:
    # In float32, one is lost beside 2**24 each of the 1023 times.
    absmax = np.ones(1024, np.float32)
    absmax[0] = 2.0**24
    assert double_quantize(absmax).offset == np.float32((2**24 + 1023) / 1024)


def test_a_tie_takes_the_lower_level() -> None:
    # The mean is zero by hand: values come in pairs of opposite sign, and one makes the scale 1.
    values = np.concatenate([SCALE_MIDPOINTS, -SCALE_MIDPOINTS, [1.0, -1.0]]).astype(np.float32)
    groups = [np.array([1.0, -1.0, m, -m], np.float32) for m in SCALE_MIDPOINTS[::5]]
    assert values.sum() == 0
    for group in groups:
        found = check(group)
        assert found.offset == 0
        above = int(np.searchsorted(SCALE_MIDPOINTS, group[2], side="left"))
        assert found.codes[2] == above
        assert SCALE_LEVELS[above] < group[2]


@pytest.mark.parametrize("blocks", [2, 100, 256, 257, 4096, 10000])
def test_scales_are_within_one_step_of_stock(blocks: int) -> None:
    dice = torch.Generator().manual_seed(blocks)
    weights = torch.randn(blocks * 64, generator=dice) * 0.02
    _, plain = stock.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    _, nested = stock.quantize_4bit(
        weights, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    found = double_quantize(plain.absmax.numpy())
    steps = np.abs(found.codes.astype(int) - nested.absmax.numpy().astype(int))
    assert steps.max() <= 1
    assert (steps == 1).mean() < 0.02
    np.testing.assert_allclose(found.absmax, nested.state2.absmax.numpy(), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(found.offset, nested.offset.item(), rtol=1e-6)


@pytest.mark.parametrize("blocks", [1, 300])
def test_equal_scales_read_back_as_those_of_stock(blocks: int) -> None:
    # There is nothing to round: stock divides zero by zero and stores another code for it, but a
    # code of any value times a nested scale of zero is zero.
    weights = torch.linspace(-0.75, 0.5, 64).repeat(blocks)
    packed, state = stock.quantize_4bit(
        weights, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    found = double_quantize(np.full(blocks, np.float32(0.75)))
    assert found.absmax.tolist() == state.state2.absmax.tolist() == [0.0] * len(found.absmax)
    back = stock.dequantize_4bit(packed, state).numpy()
    assert dequantize(packed.numpy(), found.scales(), (64 * blocks,)).tobytes() == back.tobytes()


def test_readers_compute_the_scales_that_we_say_they_do() -> None:
    dice = np.random.default_rng(5)
    absmax = np.abs(dice.normal(0.05, 0.02, 700)).astype(np.float32)
    found = double_quantize(absmax)
    state = stock.QuantState(
        absmax=torch.from_numpy(found.absmax),
        code=torch.from_numpy(SCALE_LEVELS.copy()),
        blocksize=256,
        dtype=torch.float32,
    )
    codes = torch.from_numpy(found.codes)
    read = stock.dequantize_blockwise(codes, state).numpy() + found.offset
    assert found.scales().tobytes() == read.astype(np.float32).tobytes()
    # Levels are at most 0.018 apart (of the largest distance from the mean).
    assert np.abs(found.scales() - absmax).max() <= 0.01 * np.abs(absmax - found.offset).max()
