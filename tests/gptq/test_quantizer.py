"""Codes and scales on the CPU: against the definition in float64, and what must always hold."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from nf4_pipeline.gptq import kernels_cpu
from nf4_pipeline.gptq.config import GptqConfig
from nf4_pipeline.gptq.hessian import HessianFactor, factorize
from nf4_pipeline.gptq.quantizer import GptqOnCpu, QuantizedWeight
from nf4_pipeline.gptq.scale_limits import scale_limits
from nf4_pipeline.nf4.codebook import NF4_LEVELS, SCALE_LEVELS
from nf4_pipeline.nf4.dequantize import dequantize
from nf4_pipeline.nf4.double_quant import NestedScales, double_quantize
from nf4_pipeline.nf4.packing import pack, unpack
from numpy.typing import NDArray

from tests.support.gptq_inputs import DTYPES, hessian_of, weight_of
from tests.support.gptq_reference import Array, largest_of, order_of, prepared, reference

CONFIG: Final = GptqConfig()
WHOLE: Final = ((24, 64), (12, 192), (3, 320), (1, 128), (70, 256))
RAGGED: Final = ((20, 48), (9, 100), (7, 65), (1, 3), (33, 130), (180, 100))


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


def codes_of(result: QuantizedWeight, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    codes: NDArray[np.uint8] = unpack(result.packed, int(np.prod(shape))).reshape(shape)
    return codes


def read(result: QuantizedWeight, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The weight that every reader computes."""
    return dequantize(result.packed, result.scales.scales(), shape)


def loss(weight: torch.Tensor, found: NDArray[np.float32], h: Array) -> float:
    """tr((W - Q) H (W - Q)^T), in float64."""
    off = weight.double().numpy() - found
    return float(((off @ h) * off).sum())


def quantize(
    weight: torch.Tensor, prepared: HessianFactor, pool: Executor, config: GptqConfig = CONFIG
) -> QuantizedWeight:
    return GptqOnCpu(config, pool).quantize([weight], [prepared], scale_limits(weight))


@pytest.mark.parametrize("shape", [*WHOLE, *RAGGED])
def test_what_the_definition_gives(shape: tuple[int, int], pool: Executor) -> None:
    weight, hessian = weight_of(*shape), hessian_of(shape[1])
    result = quantize(weight, factorize(hessian, 1000, CONFIG), pool)
    expected = reference(weight.double().numpy(), prepared(hessian.double().numpy(), 1000))
    codes = codes_of(result, shape)
    # A near-tie may fall the other way in float32, and changes the rest of its row.
    same = (codes == expected.codes).all(axis=1)
    assert same.mean() >= 0.95
    assert (result.scales.codes == expected.scales).mean() >= 0.95
    np.testing.assert_allclose(result.scales.absmax, expected.nested, rtol=1e-6)
    assert result.scales.offset == 0
    assert result.cost == pytest.approx(expected.cost, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 192), (300, 64), (20, 100), (11, 45)])
def test_the_cost_is_the_loss(shape: tuple[int, int], dtype: str, pool: Executor) -> None:
    weight, hessian = weight_of(*shape, dtype), hessian_of(shape[1])
    h = prepared(hessian.double().numpy(), 1000)
    result = quantize(weight, factorize(hessian, 1000, CONFIG), pool)
    found = loss(weight, read(result, shape), h)
    assert result.cost == pytest.approx(found, rel=1e-4)
    flat = weight.float().numpy().reshape(-1)
    absmax = np.array([np.abs(flat[b : b + 64]).max() for b in range(0, flat.size, 64)])
    nested = double_quantize(absmax)
    scales = np.repeat(nested.scales(), 64)[: flat.size]
    levels = np.abs(flat[:, None] / scales[:, None] - NF4_LEVELS).argmin(axis=1)
    plain = (NF4_LEVELS[levels] * scales).reshape(shape)
    assert found < 0.75 * loss(weight, plain, h)


def test_signs_of_both_kinds_are_stored_and_read_alike_by_bitsandbytes(pool: Executor) -> None:
    shape = (300, 192)  # four groups of scales, the last one not full
    weight = weight_of(*shape)
    result = quantize(weight, factorize(hessian_of(192), 1000, CONFIG), pool)
    scales = result.scales.scales()
    assert 0.2 < (scales < 0).mean() < 0.8
    state = QuantState(
        absmax=torch.from_numpy(result.scales.codes),
        shape=torch.Size(shape),
        code=torch.from_numpy(NF4_LEVELS),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.float32,
        offset=torch.tensor(0.0),
        state2=QuantState(
            absmax=torch.from_numpy(result.scales.absmax),
            blocksize=256,
            code=torch.from_numpy(SCALE_LEVELS),
            dtype=torch.float32,
        ),
    )
    packed = torch.from_numpy(result.packed).reshape(-1, 1)
    stock = dequantize_4bit(packed, state)
    assert stock.numpy().tobytes() == read(result, shape).tobytes()


def test_a_scale_is_the_best_of_all_that_could_be_stored_nearby(pool: Executor) -> None:
    """With one block a row, no choice has consequences: each must be the best of its candidates."""
    shape = (128, 64)
    weight, hessian = weight_of(*shape), hessian_of(64)
    factor = factorize(hessian, 1000, CONFIG)
    fixed = quantize(weight, factor, pool, GptqConfig(refine_scales=False))
    chosen = quantize(weight, factor, pool)
    h = prepared(hessian.double().numpy(), 1000)
    losses = [
        np.einsum("ij,jk,ik->i", off, h, off)
        for off in (weight.double().numpy() - read(c, shape) for c in (fixed, chosen))
    ]
    assert (losses[1] <= losses[0] * (1 + 1e-5)).all()
    assert losses[1].sum() < 0.97 * losses[0].sum()
    positive = quantize(weight, factor, pool, GptqConfig(negative_scales=False))
    assert (positive.scales.scales() > 0).all()
    assert chosen.cost < positive.cost


def test_every_ingredient_lowers_the_cost_that_it_is_for(pool: Executor) -> None:
    shape = (128, 256)
    weight, hessian = weight_of(*shape), hessian_of(256)
    full = factorize(hessian, 1000, CONFIG)
    cost = quantize(weight, full, pool).cost
    assert cost < quantize(weight, full, pool, GptqConfig(refine_scales=False)).cost
    one = np.ones(1, np.float32)
    assert (
        cost
        < quantize(
            weight,
            full,
            pool,
            GptqConfig(refine_scales=False, negative_scales=False, scale_candidates=one),
        ).cost
    )
    as_they_stand = factorize(hessian, 1000, GptqConfig(act_order=False))
    assert cost < quantize(weight, as_they_stand, pool).cost


def test_without_correlations_only_the_weights_of_errors_count(pool: Executor) -> None:
    """H diagonal: rounding passes nothing on, so every code is the nearest level to its weight."""
    shape = (32, 128)
    weight = weight_of(*shape)
    hessian = hessian_of(128)
    result = quantize(
        weight, factorize(hessian, 1000, GptqConfig(shrinkage=1.0, adaptive_shrinkage=False)), pool
    )
    scales = np.repeat(result.scales.scales().astype(np.float64), 64).reshape(shape)
    distance = np.abs(weight.double().numpy()[..., None] - scales[..., None] * NF4_LEVELS)
    found = np.take_along_axis(distance, codes_of(result, shape)[..., None].astype(int), -1)[..., 0]
    assert (found <= distance.min(axis=-1) * (1 + 1e-5) + 1e-9).all()


@pytest.mark.parametrize("columns", [64, 128, 100])
def test_the_order_of_columns_is_undone(columns: int, pool: Executor) -> None:
    """What is stored is in the matrix's order: errors are as small as NF4's everywhere."""
    weight = weight_of(50, columns)
    result = quantize(weight, factorize(hessian_of(columns), 1000, CONFIG), pool)
    found, exact = read(result, (50, columns)), weight.double().numpy()
    assert 0 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.25


def test_rows_do_not_touch_each_other(pool: Executor) -> None:
    """But for the largest scale of 256, which they share."""
    weight = weight_of(600, 128)
    factor = factorize(hessian_of(128), 1000, CONFIG)
    whole = codes_of(quantize(weight, factor, pool), (600, 128))
    part = codes_of(quantize(weight[128:256], factor, pool), (128, 128))
    assert (whole[128:256] == part).all()


@pytest.mark.parametrize("shape", [(2100, 128), (1500, 100)])
def test_threads_do_not_matter(shape: tuple[int, int]) -> None:
    weight, factor = weight_of(*shape), factorize(hessian_of(shape[1]), 1000, CONFIG)
    found = []
    for threads in (1, 2, 5):
        with ThreadPoolExecutor(threads) as pool:
            found.append(quantize(weight, factor, pool))
    for other in found[1:]:
        assert other.packed.tobytes() == found[0].packed.tobytes()
        assert other.scales.codes.tobytes() == found[0].scales.codes.tobytes()
        assert other.scales.absmax.tobytes() == found[0].scales.absmax.tobytes()
        assert other.cost == found[0].cost


@pytest.mark.parametrize("columns", [128, 100])
def test_zeros_stay_zeros(columns: int, pool: Executor) -> None:
    """Rows of zeros, among others and alone, in whole groups of 256 blocks and in parts of them."""
    weight = weight_of(400, columns)
    weight[:6] = 0
    weight[100:350] = 0
    result = quantize(weight, factorize(hessian_of(columns), 1000, CONFIG), pool)
    found = read(result, (400, columns))
    assert np.isfinite(result.cost)
    assert not found[1:5].any()
    assert not found[101:349].any()
    assert loss(weight, found, prepared(hessian_of(columns).double().numpy(), 1000)) == (
        pytest.approx(result.cost, rel=1e-4)
    )
    nothing = torch.zeros(3, columns, dtype=torch.bfloat16)
    empty = quantize(nothing, factorize(hessian_of(columns), 1000, CONFIG), pool)
    assert empty.cost == 0
    assert not read(empty, (3, columns)).any()


def test_a_block_without_a_scale_passes_on_what_it_loses(pool: Executor) -> None:
    """All of the first 256 blocks are zero, so none of them can take up what its row lost before.

    Rows have three blocks, so the group ends inside row 85.
    """
    weight = weight_of(86, 192, "float32") * 100
    weight[:85] = 0
    weight[85, :64] = 0
    hessian = hessian_of(192)
    hessian[:64] *= 0.1  # the block of zeros comes neither first ...
    hessian[:, :64] *= 0.1
    hessian[128:] *= 0.01  # ... nor last
    hessian[:, 128:] *= 0.01
    factor = factorize(hessian, 1000, CONFIG)
    assert (factor.order[::64] // 64).tolist() == [1, 0, 2]
    result = quantize(weight, factor, pool)
    assert result.scales.absmax[0] == 0
    found = loss(weight, read(result, (86, 192)), prepared(hessian.double().numpy(), 1000))
    assert result.cost == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("size", [1e-15, 1e-6, 1e6, 1e15])
def test_weights_of_any_size(size: float, pool: Executor) -> None:
    shape = (16, 128)
    weight = (weight_of(*shape, "float32").double() / 0.05 * size).float()
    hessian = hessian_of(128)
    result = quantize(weight, factorize(hessian, 1000, CONFIG), pool)
    found = read(result, shape).astype(np.float64)
    exact = weight.double().numpy()
    error = np.linalg.norm((found - exact) / size) / np.linalg.norm(exact / size)
    assert error < 0.25


def moved_far(shape: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor, Array]:
    """A weight, what a correction would make of it, and a Hessian that lets columns run away.

    Some inputs are large and all go together, so that what the first columns lose moves those
    whose inputs hardly matter to many times what they are; some blocks are near zero besides.
    """
    dice = np.random.default_rng(seed)
    rows, columns = shape
    weight = weight_of(rows, columns, seed=seed)
    weight[:, : columns // 3] *= 10.0 ** -float(dice.uniform(1, 4))
    x = dice.normal(size=(600, columns)) * np.exp(2 * dice.normal(size=columns))
    x += 30 * dice.normal(size=(600, 1)) * dice.normal(size=columns)
    moved = weight.float() * torch.from_numpy(np.exp(dice.normal(size=shape))).float()
    return weight, moved, x.T @ x / 600


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(24, 192), (7, 320), (20, 100), (300, 64)])
def test_no_scale_goes_beyond_what_verifying_allows(
    shape: tuple[int, int], seed: int, pool: Executor
) -> None:
    weight, moved, hessian = moved_far(shape, seed)
    factor = factorize(torch.from_numpy(hessian).float(), 600, CONFIG)

    def reach(limits: NDArray[np.float32]) -> float:
        found = GptqOnCpu(CONFIG, pool).quantize([moved], [factor], limits)
        return float((np.abs(found.scales.scales()) / allowed).max())

    allowed = largest_of(weight.double().numpy())
    assert reach(scale_limits(weight)) <= 2 * (1 + 1e-6)
    assert reach(np.full(allowed.shape, np.inf, np.float32)) > 2  # else it shows nothing


@pytest.mark.parametrize("columns", [128, 100])
def test_limits_that_bind_nothing_change_nothing(columns: int, pool: Executor) -> None:
    weight, factor = weight_of(40, columns), factorize(hessian_of(columns), 1000, CONFIG)
    found = [
        GptqOnCpu(CONFIG, pool).quantize([weight], [factor], limits)
        for limits in (scale_limits(weight), np.full(-(-40 * columns // 64), 1e30, np.float32))
    ]
    assert found[0].packed.tobytes() == found[1].packed.tobytes()
    assert found[0].scales.codes.tobytes() == found[1].scales.codes.tobytes()


def test_readers_can_hold_the_scales_of_float16(pool: Executor) -> None:
    """A block's largest weight times 1.15 may be more than float16 holds."""
    weight = (weight_of(64, 128, "float32").abs() + 0.1).clamp(max=1.0) * 65000
    result = quantize(weight.half(), factorize(hessian_of(128), 1000, CONFIG), pool)
    assert np.abs(result.scales.scales()).max() <= 65504
    assert np.isfinite(read(result, (64, 128)).astype(np.float16)).all()


def test_packing() -> None:
    assert pack(np.array([[1, 2, 3], [4, 5, 6]], np.uint8)).tolist() == [0x12, 0x34, 0x56]
    assert pack(np.array([[1, 2, 3]], np.uint8)).tolist() == [0x12, 0x37]  # padded with zero


def test_errors_of_given_codes() -> None:
    dice = np.random.default_rng(3)
    values = dice.normal(size=327).astype(np.float32)
    codes = dice.integers(0, 16, 327).astype(np.uint8)
    scales = dice.normal(size=6).astype(np.float32)
    sums = np.full((6, 2), np.nan)
    kernels_cpu.block_errors(values, pack(codes), scales, sums)
    off = (values - dequantize(pack(codes), scales, (327,))).astype(np.float64)
    blocks = np.arange(327) // 64
    np.testing.assert_allclose(sums[:, 0], np.bincount(blocks, off**2), rtol=1e-6)
    np.testing.assert_allclose(sums[:, 1], np.bincount(blocks, values.astype(float) ** 2))


def test_scale_codes_are_nearest_and_never_zero() -> None:
    dice = np.random.default_rng(4)
    scales = (dice.normal(size=600) * np.exp(4 * dice.normal(size=600))).astype(np.float32)
    scales[5], scales[6] = 0.0, -1e-30
    nested = kernels_cpu.nested_absmax(scales)
    codes = kernels_cpu.scale_codes(scales, nested, np.full(600, np.inf, np.float32))
    assert nested.tolist() == [np.abs(scales[g : g + 256]).max() for g in (0, 256, 512)]
    levels = np.delete(SCALE_LEVELS.astype(np.float64), np.flatnonzero(SCALE_LEVELS == 0))
    largest = np.repeat(nested.astype(np.float64), 256)[:600]
    found = SCALE_LEVELS[codes].astype(np.float64)
    assert (found != 0).all()
    best = np.abs(scales[:, None] / largest[:, None] - levels).min(axis=1)
    np.testing.assert_allclose(np.abs(scales / largest - found), best, rtol=1e-5, atol=1e-7)
    read_back = NestedScales(codes, nested, np.float32(0)).scales()
    assert read_back.tobytes() == (SCALE_LEVELS[codes] * np.repeat(nested, 256)[:600]).tobytes()


def test_level_zero_is_stored_where_no_other_is_within_the_limit() -> None:
    scales = np.array([1.0, -1e-6, 1e-6, 1e-6, -1e-6], np.float32)
    limits = np.array([1.0, 1.0, 1.0, 1e-7, 1e-7], np.float32)
    codes = kernels_cpu.scale_codes(scales, kernels_cpu.nested_absmax(scales), limits)
    found = SCALE_LEVELS[codes]
    assert found[1] < 0 < found[2]
    assert not found[3:].any()
    assert (np.abs(found) <= limits).all()


def test_a_choice_is_that_of_the_guide_alone(pool: Executor) -> None:
    """Twice the same, and the weight is not touched."""
    weight = weight_of(40, 128)
    before = weight.clone()
    factor = factorize(hessian_of(128), 1000, CONFIG)
    first, second = (quantize(weight, factor, pool) for _ in range(2))
    assert first.packed.tobytes() == second.packed.tobytes()
    assert torch.equal(weight, before)
    assert replace(CONFIG).scale_candidates.tobytes() == CONFIG.scale_candidates.tobytes()


def test_the_reference_orders_as_the_guide_does() -> None:
    for columns in (64, 192, 100):
        hessian = hessian_of(columns, seed=columns)
        found: Any = factorize(hessian, 1000, CONFIG).order.numpy()
        assert found.tolist() == order_of(prepared(hessian.double().numpy(), 1000)).tolist()


@pytest.mark.parametrize("columns", [128, 100])
@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), 1e30])
def test_a_weight_that_nothing_can_be_said_of_has_no_finite_cost(
    columns: int, spoil: float, pool: Executor
) -> None:
    weight = weight_of(8, columns, "float32")
    weight[3] *= spoil
    result = quantize(weight, factorize(hessian_of(columns), 1000, CONFIG), pool)
    assert not np.isfinite(result.cost)
