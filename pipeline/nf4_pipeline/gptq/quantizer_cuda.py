"""A weight and the factor of its Hessian -> codes and scales, on CUDA devices."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from nf4_pipeline.gptq import kernels_cpu
from nf4_pipeline.gptq.config import GptqConfig
from nf4_pipeline.gptq.device_group import DeviceGroup
from nf4_pipeline.gptq.hessian import HessianFactor
from nf4_pipeline.gptq.quantizer import GptqOnCpu, QuantizedWeight
from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.double_quant import NestedScales
from nf4_pipeline.nf4.packing import pack_pairs

if TYPE_CHECKING:
    from nf4_pipeline.gptq.kernels_triton import Tables

_Rounded = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]


class GptqOnCuda:
    """Rounds rows at once; for the same factor the result is that of the CPU, bit for bit.

    Args:
        config: what is tried.
        group: the devices.
        pool: threads of the CPU, for weights whose rows are not whole blocks.
    """

    def __init__(self, config: GptqConfig, group: DeviceGroup, pool: Executor) -> None:
        self._config = config
        self._group = group
        self._on_cpu = GptqOnCpu(config, pool)
        self._there = [_OnDevice(config, device) for device in group.devices]

    def quantize(
        self,
        rows: Sequence[torch.Tensor],
        factors: Sequence[HessianFactor],
        dtype: torch.dtype | None = None,
    ) -> QuantizedWeight:
        """See `nf4_pipeline.gptq.quantizer.GptqQuantizer`."""
        if rows[0].shape[1] % BLOCK_SIZE or not self._config.refine_scales:
            whole = torch.cat([part.cpu() for part in rows])
            return self._on_cpu.quantize([whole], [factors[0].cpu()], dtype)
        limit = torch.finfo(dtype or rows[0].dtype).max
        weights = [part.contiguous() for part in rows]
        firsts = list(accumulate((len(part) for part in rows), initial=0))

        def begin(index: int) -> torch.Tensor | None:
            if index >= len(rows):
                return None
            with torch.cuda.device(weights[index].device):
                return self._there[index].start_scales(weights[index], factors[index], limit)

        starts = self._group.each(begin)
        # Scales refer to the largest of 256, which may lie on two devices.
        on_host = [start.cpu().numpy() for start in starts if start is not None]
        nested = kernels_cpu.nested_absmax(_joined(on_host))

        def finish(index: int) -> _Rounded | None:
            start = starts[index]
            if start is None:
                return None
            weight, there = weights[index], self._there[index]
            with torch.cuda.device(weight.device):
                return there.round_rows(weight, factors[index], start, nested, firsts[index])

        found = [part for part in self._group.each(finish) if part is not None]
        packed = _joined([part[0] for part in found])
        codes = _joined([part[1] for part in found])
        costs = _joined([part[2] for part in found])
        cost = float(costs.sum(dtype=np.float64))
        return QuantizedWeight(packed, NestedScales(codes, nested, np.float32(0)), cost)


class _OnDevice:
    """The kernels on one device."""

    def __init__(self, config: GptqConfig, device: torch.device) -> None:
        from nf4_pipeline.gptq.kernels_triton import Tables

        self._signs = config.signs
        self._tables: Tables = Tables(device)
        self._candidates = torch.from_numpy(config.scale_candidates).to(device)

    def start_scales(
        self, weight: torch.Tensor, factor: HessianFactor, limit: float
    ) -> torch.Tensor:
        """See `nf4_pipeline.gptq.kernels_cpu.start_scales`."""
        from nf4_pipeline.gptq import kernels_triton

        scales: torch.Tensor = kernels_triton.start_scales(
            weight, factor.diagonal, self._candidates, self._signs, limit, self._tables
        )
        return scales

    def round_rows(
        self,
        weight: torch.Tensor,
        factor: HessianFactor,
        start: torch.Tensor,
        nested: NDArray[np.float32],
        first: int,
    ) -> _Rounded:
        """Packed codes, the scales' codes, and the cost of each row, on the CPU.

        Args:
            weight: some rows.
            factor: of their inputs' Hessian.
            start: the scales that they begin with.
            nested: of the whole weight.
            first: the place of these rows in it.
        """
        from nf4_pipeline.gptq import kernels_triton

        permuted, scale_codes, costs = kernels_triton.round_rows(
            weight.float()[:, factor.order].contiguous(),
            factor.factor,
            (factor.order[::BLOCK_SIZE] // BLOCK_SIZE).tolist(),
            start,
            torch.from_numpy(nested).to(weight.device),
            self._candidates,
            self._signs,
            self._tables,
            first,
        )
        codes = torch.empty_like(permuted)
        codes[:, factor.order] = permuted
        return (
            pack_pairs(codes.reshape(-1)).cpu().numpy(),
            scale_codes.cpu().numpy(),
            costs.cpu().numpy(),
        )


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
