"""Several CUDA devices choose what one of them does, byte for byte.

One device that stands there twice shares the work, too, so most of it runs where there is one GPU.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from nf4_pipeline.calibration import calibration_pass as passes
from nf4_pipeline.machine import Machine

from tests.support.calibrated import bytes_of, downloaded, quantized, settings
from tests.support.gptq_inputs import hessian_of
from tests.support.passes import SEVERAL, Cases, cases

torch = pytest.importorskip("torch")
COUNT: Final = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(COUNT == 0, reason="no CUDA device"),
    pytest.mark.usefixtures("workers_here"),
]

GROUPS: Final = [["cuda:0"] * 2, ["cuda:0"] * 3] + [
    [f"cuda:{number}" for number in range(count)] for count in (2, 4, 8) if count <= COUNT
]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return cases(tmp_path_factory)


@pytest.mark.parametrize("devices", GROUPS, ids="+".join)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(96, 256), (37, 640), (200, 1024), (1, 64), (2, 192), (37, 101), (1500, 4544)],
)
def test_rows_on_several_devices_are_rounded_as_on_a_cpu(
    rows: int, columns: int, devices: list[str]
) -> None:
    """Where rows are cut, a group of 256 scales that refer to one lies on two devices."""
    from nf4_pipeline.gptq.config import GptqConfig
    from nf4_pipeline.gptq.device_group import DeviceGroup
    from nf4_pipeline.gptq.hessian import factorize
    from nf4_pipeline.gptq.quantizer import GptqOnCpu
    from nf4_pipeline.gptq.quantizers import quantizer_for
    from nf4_pipeline.gptq.scale_limits import scale_limits

    dice = torch.Generator().manual_seed(rows + columns)
    weight = (torch.randn(rows, columns, generator=dice) * 0.02).bfloat16()
    factor = factorize(hessian_of(columns), 1000, GptqConfig())
    ends = [rows * i // len(devices) for i in range(1, len(devices))]
    cuts = [0, *sorted({end for end in ends if end}), rows]
    with ThreadPoolExecutor(4) as pool, torch.inference_mode():
        group = DeviceGroup([torch.device(device) for device in devices], None, pool)
        parts = [
            weight[a:b].to(device) for (a, b), device in zip(pairwise(cuts), devices, strict=False)
        ]
        factors = [factor.to(device) for device in group.devices]
        limits = scale_limits(weight)
        found = quantizer_for(group, GptqConfig(), pool).quantize(parts, factors, limits)
        expected = GptqOnCpu(GptqConfig(), pool).quantize([weight], [factor], limits)
    assert np.array_equal(found.packed, expected.packed)
    assert np.array_equal(found.scales.codes, expected.scales.codes)
    assert found.scales.absmax.tobytes() == expected.scales.absmax.tobytes()


@pytest.mark.parametrize("devices", GROUPS, ids="+".join)
@pytest.mark.parametrize("columns", [64, 1100, 4544])
def test_sums_and_factors_do_not_depend_on_who_computes_them(
    columns: int, devices: list[str]
) -> None:
    from nf4_pipeline.calibration.block_inputs import InputMoments, LayerInputs
    from nf4_pipeline.gptq.config import GptqConfig
    from nf4_pipeline.gptq.device_group import DeviceGroup
    from nf4_pipeline.gptq.hessian import factorize

    dice = torch.Generator().manual_seed(columns)
    ys = [torch.randn(tokens, columns, generator=dice).bfloat16() for tokens in (2048, 300, 2048)]
    results: list[tuple[Any, ...]] = []
    for names in (["cuda:0"], devices):
        with ThreadPoolExecutor(len(names)) as pool, torch.inference_mode():
            group = DeviceGroup([torch.device(name) for name in names], None, pool)
            homes = [names[number % len(names)] for number in range(len(ys))]
            calls = [(y.to(home), y.to(home) * 1.25) for y, home in zip(ys, homes, strict=True)]
            moments = InputMoments(LayerInputs(calls), group)
            hessian = moments.hessian()
            factor = factorize(hessian, 4396, GptqConfig(), group, moments.add_drift)
            results.append((hessian, moments.drift(), factor.order, factor.factor, factor.diagonal))
    for one, several in zip(*results, strict=True):
        assert torch.equal(one, several)
    y = torch.cat(ys).double()
    exact = y.T @ y / len(y)
    assert float((results[0][0].cpu().double() - exact).abs().max()) < 1e-3 * float(exact.max())


@pytest.mark.parametrize("devices", GROUPS, ids="+".join)
@pytest.mark.parametrize("kind", SEVERAL)
def test_the_pass_gives_the_same_bytes(
    kind: str,
    devices: list[str],
    case: Cases,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five batches, and layers that are cut though they are small."""
    monkeypatch.setitem(passes.TOGETHER, "cuda", 256)
    one = case(kind).chosen(tmp_path / "one", ["cuda:0"])
    assert len(one) >= 2
    assert case(kind).chosen(tmp_path / "several", devices) == one


@pytest.mark.skipif(COUNT < 2, reason="fewer than two CUDA devices")
def test_the_sample_has_the_same_hashes_on_all_devices_and_on_one(tmp_path: Path) -> None:
    """And "cuda" means all of them."""
    found = {}
    for device in ("cuda:0", "cuda:1", "cuda"):
        build = downloaded(Path("sample"), tmp_path / device.replace(":", ""))
        quantized(build, settings(tokens=16384), machine=Machine(device=device))
        found[device] = bytes_of(build)
    assert found["cuda"] == found["cuda:0"] == found["cuda:1"]
    assert len(found["cuda"]) >= 3
