"""The compiled kernels: codes and absmax bit-equal to bitsandbytes, sums against plain NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional as stock
from hypothesis import example, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from nf4_pipeline.nf4 import cpu
from nf4_pipeline.nf4.codebook import NF4_MIDPOINTS, ZERO_CODE
from nf4_pipeline.nf4.dequantize import dequantize
from nf4_pipeline.nf4.float_bits import bits_of
from nf4_pipeline.nf4.packing import unpack
from numpy.typing import NDArray

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SIZES = (1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 4095, 4096, 4097)
EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}


@dataclass(frozen=True)
class Result:
    """What the kernel left."""

    packed: NDArray[np.uint8]
    absmax: NDArray[np.float32]
    sums: NDArray[np.int32]
    not_finite: int | None


def from_bits(bits: NDArray[Any], dtype: str) -> torch.Tensor:
    return torch.from_numpy(bits.copy()).view(DTYPES[dtype])


def ours(bits: NDArray[Any], dtype: str) -> Result:
    blocks = -(-bits.size // 64)
    # Filled with garbage first: the kernel must write everything.
    packed = np.full(-(-bits.size // 2), 0xEE, np.uint8)
    absmax = np.full(blocks, np.float32(-5.0), np.float32)
    sums = np.full((blocks, 3), -5, np.int32)
    not_finite = cpu.quantize_blocks(bits, dtype, packed, absmax, sums)
    return Result(packed, absmax, sums, not_finite)


def check_equal(weights: torch.Tensor, dtype: str) -> Result:
    """Holds the kernel against bitsandbytes for the same tensor."""
    found = ours(bits_of(weights), dtype)
    packed, state = stock.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    assert found.not_finite is None
    assert found.packed.tobytes() == packed.numpy().tobytes()
    assert found.absmax.tobytes() == state.absmax.float().numpy().tobytes()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_normal_weights_of_every_length(dtype: str, size: int) -> None:
    dice = torch.Generator().manual_seed(size)
    check_equal((torch.randn(size, generator=dice) * 0.02).to(DTYPES[dtype]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_matrix(dtype: str) -> None:
    dice = torch.Generator().manual_seed(7)
    weights = (torch.randn(300, 771, generator=dice) * 0.05).to(DTYPES[dtype])
    check_equal(weights.reshape(-1), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_finite_16_bit_pattern(dtype: str) -> None:
    every = np.arange(2**16, dtype=np.uint16)
    finite = every[(every & EXPONENT[dtype]) != EXPONENT[dtype]]
    # In order, neighbours share a block; shuffled, each block mixes magnitudes.
    check_equal(from_bits(finite, dtype), dtype)
    check_equal(from_bits(np.random.default_rng(0).permutation(finite), dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 64, 65, 127, 192])
def test_zeros(dtype: str, size: int) -> None:
    found = check_equal(torch.zeros(size, dtype=DTYPES[dtype]), dtype)
    assert (unpack(found.packed, size) == ZERO_CODE).all()
    check_equal(-torch.zeros(size, dtype=DTYPES[dtype]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", [1, 7, 63])
def test_a_zero_block_among_others_and_a_zero_tail(dtype: str, tail: int) -> None:
    weights = torch.linspace(-3, 2, 192 + tail)
    weights[64:128] = 0
    weights[192:] = 0
    check_equal(weights.to(DTYPES[dtype]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 70, 129])
def test_subnormal_weights(dtype: str, size: int) -> None:
    smallest = np.arange(1, size + 1)
    kind = np.uint32 if dtype == "float32" else np.uint16
    check_equal(from_bits(smallest.astype(kind), dtype), dtype)
    # About the constant that keeps 1 / absmax finite, where the type reaches so low.
    near = torch.full((size,), 1e-38) * torch.linspace(-1.3, 1.3, size)
    check_equal(near.to(DTYPES[dtype]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 70, 129])
def test_huge_weights(dtype: str, size: int) -> None:
    largest = torch.finfo(DTYPES[dtype]).max
    weights = torch.linspace(-1, 1, size, dtype=torch.float64) * largest
    check_equal(weights.to(DTYPES[dtype]), dtype)


@pytest.mark.parametrize("size", [64, 37])
def test_values_exactly_on_midpoints_take_the_lower_level(size: int) -> None:
    weights = torch.zeros(size)
    weights[0] = 1.0  # the scale is one, so nothing is rounded on the way to the comparison
    weights[1:16] = torch.from_numpy(NF4_MIDPOINTS.copy())
    weights[16:31] = torch.from_numpy(np.nextafter(NF4_MIDPOINTS, np.float32(2)))
    found = check_equal(weights, "float32")
    codes = unpack(found.packed, size)
    assert codes[1:16].tolist() == list(range(15))
    assert codes[16:31].tolist() == list(range(1, 16))


@pytest.mark.parametrize("exponent", [-60, -3, 5, 90])
def test_midpoints_under_any_power_of_two(exponent: int) -> None:
    weights = torch.ones(64)
    weights[1:16] = torch.from_numpy(NF4_MIDPOINTS.copy())
    found = check_equal(weights * 2.0**exponent, "float32")
    assert unpack(found.packed, 64)[1:16].tolist() == list(range(15))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 63, 65, 127])
def test_an_odd_number_of_weights_is_padded_with_the_code_of_zero(dtype: str, size: int) -> None:
    found = check_equal(torch.ones(size, dtype=DTYPES[dtype]), dtype)
    assert found.packed[-1] & 0x0F == ZERO_CODE


def finite_patterns(dtype: str) -> st.SearchStrategy[list[int]]:
    width = 32 if dtype == "float32" else 16
    exponent = EXPONENT[dtype]
    patterns = st.integers(0, 2**width - 1).filter(lambda bits: bits & exponent != exponent)
    return st.lists(patterns, min_size=1, max_size=200)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_finite_bits(dtype: str) -> None:
    kind = np.uint32 if dtype == "float32" else np.uint16

    @given(finite_patterns(dtype))
    @example([0])
    @example([1] * 65)
    @limits(max_examples=300)
    def holds(patterns: list[int]) -> None:
        check_equal(from_bits(np.array(patterns, kind), dtype), dtype)

    holds()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["inf", "-inf", "nan", "-nan"])
@pytest.mark.parametrize(
    ("size", "positions", "block"),
    [(64, [0], 0), (64, [63], 0), (200, [199], 3), (256, [130, 250], 2), (1, [0], 0)],
)
def test_the_first_block_that_is_not_finite_is_named(
    dtype: str, kind: str, size: int, positions: list[int], block: int
) -> None:
    weights = torch.ones(size, dtype=DTYPES[dtype])
    for position in positions:
        weights[position] = float(kind)
    if kind == "-nan":
        weights = torch.where(weights.isnan(), -weights.abs(), weights)
    assert ours(bits_of(weights), dtype).not_finite == block


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_beside_larger_weights_does_not_vanish(dtype: str) -> None:
    weights = torch.full((64,), torch.finfo(DTYPES[dtype]).max, dtype=DTYPES[dtype])
    weights[5] = float("nan")
    assert ours(bits_of(weights), dtype).not_finite == 0


@pytest.mark.parametrize("factor", [0.03, 1e-25, 1e25])
@pytest.mark.parametrize("stretch", [1.0, 1.01, 0.97])
@pytest.mark.parametrize("size", [63, 64, 1000, 4097])
def test_squared_error_against_a_direct_computation(
    size: int, stretch: float, factor: float
) -> None:
    dice = torch.Generator().manual_seed(size)
    weights = torch.randn(size, generator=dice) * factor
    found = ours(bits_of(weights), "float32")
    scales = found.absmax * np.float32(stretch)  # readers' scales are never quite the absmax
    error, energy = cpu.squared_error(found.absmax, found.sums, scales)
    values = weights.double().numpy()
    back = dequantize(found.packed, scales, (size,)).astype(np.float64)
    np.testing.assert_allclose(error, ((values - back) ** 2).sum(), rtol=1e-3)
    np.testing.assert_allclose(energy, (values**2).sum(), rtol=1e-3)


def test_squared_error_is_never_negative() -> None:
    weights = torch.full((64,), 0.3)  # every weight is met exactly, so rounding decides the sign
    found = ours(bits_of(weights), "float32")
    error, energy = cpu.squared_error(found.absmax, found.sums, found.absmax)
    assert 0 <= error < 1e-6 * energy
    assert energy == pytest.approx(64 * 0.09, rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_of_whole_blocks_give_what_one_call_gives(dtype: str) -> None:
    dice = torch.Generator().manual_seed(3)
    bits = bits_of(torch.randn(1000, generator=dice).to(DTYPES[dtype]))
    whole = ours(bits, dtype)
    parts = [ours(bits[start : start + 192], dtype) for start in range(0, 1000, 192)]
    assert np.concatenate([part.packed for part in parts]).tobytes() == whole.packed.tobytes()
    assert np.concatenate([part.absmax for part in parts]).tobytes() == whole.absmax.tobytes()
    assert np.concatenate([part.sums for part in parts]).tobytes() == whole.sums.tobytes()
