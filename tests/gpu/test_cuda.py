"""On a CUDA device: the same bytes as on the CPU, and a build that is verified there.

Run by `scripts/campaigns/gpu_checks.py` on a machine that has one; the results stand in
docs/performance.md.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nf4_pipeline.machine import Machine
from nf4_pipeline.nf4 import cpu
from nf4_pipeline.nf4.float_bits import bits_of
from nf4_pipeline.nf4.packing import blocks_of
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.stages.download_request import DownloadRequest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SIZES = [1, 2, 63, 64, 65, 127, 4096, 64 * 8192 * 3 + 17, 4544 * 4672]


def _weights(kind: str, size: int) -> Any:
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(size, generator=generator) * 0.02
    if kind == "zeros":
        values[: size // 2] = 0
    elif kind == "huge":
        values *= 1e36
    elif kind == "subnormal":
        values *= 1e-37
    elif kind == "constant":
        values[:] = 0.3
    return values


def _run(quantize: Any, bits: NDArray[Any], dtype: str) -> tuple[NDArray[Any], ...]:
    size = bits.size
    packed = np.zeros(-(-size // 2), np.uint8)
    absmax = np.zeros(blocks_of(size), np.float32)
    sums = np.zeros((blocks_of(size), 3), np.int32)
    assert quantize(bits, dtype, packed, absmax, sums) is None
    return packed, absmax, sums


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", ["plain", "zeros", "huge", "subnormal", "constant"])
def test_cuda_gives_the_bits_of_the_cpu(dtype: str, kind: str) -> None:
    from nf4_pipeline.nf4.cuda import NearestOnCuda

    if dtype == "float16" and kind in ("huge", "subnormal"):
        pytest.skip("outside the range of float16")
    on_cuda, on_cpu = NearestOnCuda(["cuda:0"]).quantize, cpu.quantize_blocks
    for size in SIZES:
        bits = bits_of(_weights(kind, size).to(getattr(torch, dtype)))
        for name, a, b in zip(
            ("codes", "absmax", "sums"),
            _run(on_cuda, bits, dtype),
            _run(on_cpu, bits, dtype),
            strict=True,
        ):
            assert np.array_equal(a.view(np.uint8), b.view(np.uint8)), (name, size)


def test_chunks_of_any_size_and_dtype_take_turns_on_a_device() -> None:
    from nf4_pipeline.nf4.cuda import NearestOnCuda

    rounding = NearestOnCuda(["cuda:0"])
    sizes = [64, 64 * 4096, 64 * 33, 64 * 7000, 64 * 4097, 64 * 12, 64 * 9001]
    chunks = list(product(sizes, ("float32", "bfloat16", "float16")))

    def same(chunk: tuple[int, str]) -> bool:
        size, dtype = chunk
        bits = bits_of(_weights("plain", size).to(getattr(torch, dtype)))
        pairs = zip(
            _run(rounding.quantize, bits, dtype),
            _run(cpu.quantize_blocks, bits, dtype),
            strict=True,
        )
        return all(np.array_equal(a, b) for a, b in pairs)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(same, chunks * 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_cuda_finds_what_is_not_finite(value: float) -> None:
    from nf4_pipeline.nf4.cuda import NearestOnCuda

    weights = _weights("plain", 64 * 10)
    weights[64 * 7 + 3] = value
    bits = bits_of(weights.to(torch.bfloat16))
    found = NearestOnCuda(["cuda:0"]).quantize(
        bits,
        "bfloat16",
        np.zeros(320, np.uint8),
        np.zeros(10, np.float32),
        np.zeros((10, 3), np.int32),
    )
    assert found == 7


def test_a_build_has_the_same_hashes_on_cpu_and_cuda_and_passes_there(tmp_path: Path) -> None:
    from nf4_pipeline.job import run_build
    from nf4_pipeline.progress import SILENT

    gpu = Machine(device="cuda", require_gpu=True)
    cpu = Machine(device="cpu", workers=2)
    request = DownloadRequest("sample", tmp_path / "cuda")
    build, results = run_build(request, Recipe(), gpu, SILENT)
    other, _ = run_build(replace(request, artifacts=tmp_path / "cpu"), Recipe(), cpu, SILENT)
    mine = (build.export / "manifest.json").read_bytes()
    assert mine == (other.export / "manifest.json").read_bytes()
    for name in json.loads(mine)["files"]:
        assert (build.export / name).read_bytes() == (other.export / name).read_bytes(), name
    found = results["verify"].record.facts.to_json()
    assert found["verdict"] == "pass"
    assert found["device"]["kind"] == "cuda"
