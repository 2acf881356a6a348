"""What holds for everything that chooses codes and scales as the engine asks for them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from nf4_pipeline.gptq.quantizer import QuantizedWeight
from nf4_pipeline.gptq.saved_codes import PrecomputedRounding, tensors_of
from nf4_pipeline.nf4.dequantize import dequantize
from nf4_pipeline.nf4.double_quant import NestedScales
from nf4_pipeline.nf4.float_bits import bits_of, float32_of
from nf4_pipeline.nf4.packing import blocks_of, packed_bytes
from nf4_pipeline.nf4.rounding import NearestOnCpu, RoundedWeight, Rounding
from numpy.typing import NDArray
from safetensors.numpy import save_file

DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SIZES: Final = (1, 63, 64, 65, 4096, 64 * 1000 + 17)


def _precomputed(folder: Path) -> Rounding:
    """Files with any codes, for weights of all sizes."""
    files = {}
    for size in SIZES:
        rng = np.random.default_rng(size)
        blocks = blocks_of(size)
        scales = NestedScales(
            rng.integers(0, 256, blocks).astype(np.uint8),
            rng.random(-(-blocks // 256)).astype(np.float32),
            np.float32(0.0),
        )
        packed = rng.integers(0, 256, packed_bytes(size)).astype(np.uint8)
        name = f"w{size}"
        files[name] = folder / f"{name}.safetensors"
        save_file(tensors_of(name, QuantizedWeight(packed, scales, 0.0)), files[name])
    return PrecomputedRounding(files, NearestOnCpu())


def _on_cuda(_: Path) -> Rounding:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from nf4_pipeline.nf4.cuda import NearestOnCuda

    return NearestOnCuda(["cuda:0"])


def _absent(folder: Path) -> Rounding:
    """Nothing is precomputed."""
    return PrecomputedRounding({}, NearestOnCpu())


ROUNDINGS: Final[dict[str, Callable[[Path], Rounding]]] = {
    "nearest on the CPU": lambda _: NearestOnCpu(),
    "precomputed": _precomputed,
    "none precomputed": _absent,
    "nearest on CUDA": _on_cuda,
}
CASES: Final = [
    pytest.param(name, marks=pytest.mark.gpu if "CUDA" in name else ()) for name in ROUNDINGS
]


@pytest.fixture(params=CASES)
def rounding(request: pytest.FixtureRequest, tmp_path: Path) -> Rounding:
    return ROUNDINGS[request.param](tmp_path)


def bits(size: int, dtype: str) -> NDArray[Any]:
    generator = torch.Generator().manual_seed(size)
    return bits_of((torch.randn(size, generator=generator) * 0.02).to(DTYPES[dtype]))


def quantize(
    rounding: Rounding, values: NDArray[Any], dtype: str, step: int, threads: int = 1
) -> tuple[NDArray[np.uint8], RoundedWeight]:
    """All chunks of a weight, the last ones first."""
    weight = rounding.start_weight(f"w{values.size}", values.size)
    packed = np.full(packed_bytes(values.size), 0xEE, np.uint8)

    def chunk(start: int) -> None:
        part = values[start : start + step]
        place = slice(start // 2, start // 2 + packed_bytes(part.size))
        assert weight.quantize_chunk(part, dtype, start, packed[place]) is None

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(chunk, reversed(range(0, values.size, step))))
    return packed, weight.finish()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_chunks_in_any_order_give_what_one_chunk_gives(
    rounding: Rounding, size: int, dtype: str
) -> None:
    values = bits(size, dtype)
    whole, expected = quantize(rounding, values, dtype, size + 64 - size % 64)
    parts, found = quantize(rounding, values, dtype, 64, threads=4)
    assert parts.tobytes() == whole.tobytes()
    assert found.scales.codes.tobytes() == expected.scales.codes.tobytes()
    assert found.scales.absmax.tobytes() == expected.scales.absmax.tobytes()
    assert found.scales.offset == expected.scales.offset
    assert found.relative_rmse == expected.relative_rmse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_error_is_that_of_what_readers_compute(
    rounding: Rounding, size: int, dtype: str
) -> None:
    values = bits(size, dtype)
    packed, weight = quantize(rounding, values, dtype, 1024)
    assert weight.scales.codes.size == blocks_of(size)
    exact = float32_of(values, dtype).astype(np.float64)
    off = dequantize(packed, weight.scales.scales(), (size,)) - exact
    expected = np.sqrt((off**2).sum() / (exact**2).sum())
    # A block of one weight is met exactly but for the fixed point of the sums.
    assert weight.relative_rmse == pytest.approx(expected, rel=1e-3, abs=2e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("place", "block"), [(0, 0), (63, 0), (64, 1), (4095, 63)])
def test_the_first_block_that_is_not_finite_is_named(
    rounding: Rounding, dtype: str, value: float, place: int, block: int
) -> None:
    values = torch.from_numpy(bits(4096, dtype)).view(DTYPES[dtype]).clone()
    values[place:] = value
    weight = rounding.start_weight("w4096", 4096)
    packed = np.zeros(2048, np.uint8)
    assert weight.quantize_chunk(bits_of(values), dtype, 0, packed) == block


def test_buffers_hold_what_was_asked_for(rounding: Rounding) -> None:
    assert rounding.workers >= 1
    assert rounding.max_chunk_bytes >= 2**20
    for nbytes in (0, 1, 4097):
        buffer = rounding.buffer(nbytes)
        assert buffer.dtype == np.uint8
        assert buffer.shape == (nbytes,)
        assert buffer.flags.writeable
