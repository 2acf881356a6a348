"""What holds for everything that quantizes a weight by the factor of its Hessian."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import pytest
import torch
from nf4_pipeline.gptq.config import GptqConfig
from nf4_pipeline.gptq.device_group import DeviceGroup
from nf4_pipeline.gptq.hessian import factorize
from nf4_pipeline.gptq.quantizer import QuantizedWeight
from nf4_pipeline.gptq.quantizers import GptqQuantizer, quantizer_for
from nf4_pipeline.gptq.scale_limits import scale_limits
from nf4_pipeline.nf4.dequantize import dequantize
from nf4_pipeline.nf4.packing import packed_bytes

from tests.support.gptq_inputs import DTYPES, hessian_of, weight_of

SHAPES: Final = ((24, 64), (12, 192), (1, 128), (20, 48), (33, 130))
DEVICES: Final = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name != "cpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return name


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


def quantize(quantizer: GptqQuantizer, weight: torch.Tensor, device: str) -> QuantizedWeight:
    factor = factorize(hessian_of(weight.shape[1]).to(device), 1000, GptqConfig())
    return quantizer.quantize([weight.to(device)], [factor], scale_limits(weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cost_is_what_the_codes_lose(
    shape: tuple[int, int], dtype: str, device: str, pool: ThreadPoolExecutor
) -> None:
    weight, config = weight_of(*shape, dtype), GptqConfig()
    result = quantize(
        quantizer_for(DeviceGroup([torch.device(device)]), config, pool), weight, device
    )
    assert result.packed.shape == (packed_bytes(weight.numel()),)
    assert result.scales.offset == 0
    hessian = hessian_of(shape[1]).double()
    h = hessian * (1 - min(config.shrinkage, shape[1] / 1000))
    diagonal = hessian.diagonal()
    h.diagonal().copy_(diagonal + config.percdamp * diagonal.mean())
    off = torch.from_numpy(dequantize(result.packed, result.scales.scales(), shape)) - weight
    cost = float(((off.double() @ h) * off.double()).sum())
    assert result.cost == pytest.approx(cost, rel=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_twice_and_the_weight_is_not_touched(
    shape: tuple[int, int], device: str, pool: ThreadPoolExecutor
) -> None:
    weight = weight_of(*shape)
    before = weight.clone()
    quantizer = quantizer_for(DeviceGroup([torch.device(device)]), GptqConfig(), pool)
    first, second = (quantize(quantizer, weight, device) for _ in range(2))
    assert torch.equal(weight, before)
    assert first.packed.tobytes() == second.packed.tobytes()
    assert first.scales.codes.tobytes() == second.scales.codes.tobytes()
    assert first.scales.absmax.tobytes() == second.scales.absmax.tobytes()
    assert first.cost == second.cost


@pytest.mark.parametrize("columns", [128, 100])
def test_zeros_stay_zeros(columns: int, device: str, pool: ThreadPoolExecutor) -> None:
    weight = torch.zeros(3, columns, dtype=torch.bfloat16)
    result = quantize(
        quantizer_for(DeviceGroup([torch.device(device)]), GptqConfig(), pool), weight, device
    )
    assert result.cost == 0
    assert not dequantize(result.packed, result.scales.scales(), (3, columns)).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("columns", [128, 100])
def test_what_is_not_finite_has_no_finite_cost(
    columns: int, value: float, device: str, pool: ThreadPoolExecutor
) -> None:
    weight = weight_of(8, columns, "float32")
    weight[3] = value
    result = quantize(
        quantizer_for(DeviceGroup([torch.device(device)]), GptqConfig(), pool), weight, device
    )
    assert not np.isfinite(result.cost)
