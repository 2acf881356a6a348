"""A weight and the factor of its Hessian -> codes and scales, on CUDA devices."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from itertools import accumulate
from typing import TYPE_CHECKING

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
        limits: NDArray[np.float32],
    ) -> QuantizedWeight:
        """See `nf4_pipeline.gptq.quantizers.GptqQuantizer`."""
        columns = rows[0].shape[1]
        if columns % BLOCK_SIZE or not self._config.refine_scales:
            whole = torch.cat([part.cpu() for part in rows])
            return self._on_cpu.quantize([whole], [factors[0].cpu()], limits)
        weights = [part.contiguous() for part in rows]
        firsts = list(accumulate((len(part) for part in rows), initial=0))
        blocks = [first * columns // BLOCK_SIZE for first in firsts]
        own_limits = [
            torch.from_numpy(limits[blocks[i] : blocks[i + 1]]).to(part.device)
            for i, part in enumerate(weights)
        ]

        def begin(index: int) -> torch.Tensor | None:
            if index >= len(rows):
                return None
            with torch.cuda.device(weights[index].device):
                return self._there[index].start_scales(
                    weights[index], factors[index], own_limits[index]
                )

        starts = self._group.each(begin)
        # Scales refer to the largest of 256, which may lie on two devices.
        on_host = [start.cpu().numpy() for start in starts if start is not None]
        nested = kernels_cpu.nested_absmax(np.concatenate(on_host))

        packed = torch.empty(firsts[-1] * columns // 2, dtype=torch.uint8)
        codes = torch.empty(blocks[-1], dtype=torch.uint8)
        costs = torch.empty(firsts[-1])

        def finish(index: int) -> None:
            start = starts[index]
            if start is None:
                return
            weight, there = weights[index], self._there[index]
            first, last = firsts[index : index + 2]
            with torch.cuda.device(weight.device):
                found = there.round_rows(
                    weight, factors[index], start, own_limits[index], nested, first
                )
            packed[first * columns // 2 : last * columns // 2].copy_(found[0])
            codes[blocks[index] : blocks[index + 1]].copy_(found[1])
            costs[first:last].copy_(found[2])

        self._group.each(finish)
        scales = NestedScales(codes.numpy(), nested, np.float32(0))
        return QuantizedWeight(packed.numpy(), scales, float(costs.numpy().sum(dtype=np.float64)))


class _OnDevice:
    """The kernels on one device."""

    def __init__(self, config: GptqConfig, device: torch.device) -> None:
        from nf4_pipeline.gptq.kernels_triton import Tables

        self._signs = config.signs
        self._tables: Tables = Tables(device)
        self._candidates = torch.from_numpy(config.scale_candidates).to(device)

    def start_scales(
        self, weight: torch.Tensor, factor: HessianFactor, limits: torch.Tensor
    ) -> torch.Tensor:
        """See `nf4_pipeline.gptq.kernels_cpu.start_scales`."""
        from nf4_pipeline.gptq import kernels_triton

        scales: torch.Tensor = kernels_triton.start_scales(
            weight, factor.diagonal, self._candidates, self._signs, limits, self._tables
        )
        return scales

    def round_rows(
        self,
        weight: torch.Tensor,
        factor: HessianFactor,
        start: torch.Tensor,
        limits: torch.Tensor,
        nested: NDArray[np.float32],
        first: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Packed codes, the scales' codes, and the cost of each row.

        Args:
            weight: some rows.
            factor: of their inputs' Hessian.
            start: the scales that they begin with.
            limits: what no scale may be beyond.
            nested: of the whole weight.
            first: the place of these rows in it.
        """
        from nf4_pipeline.gptq import kernels_triton

        permuted, scale_codes, costs = kernels_triton.round_rows(
            weight.float()[:, factor.order].contiguous(),
            factor.factor,
            (factor.order[::BLOCK_SIZE] // BLOCK_SIZE).tolist(),
            start,
            limits,
            torch.from_numpy(nested).to(weight.device),
            self._candidates,
            self._signs,
            self._tables,
            first,
        )
        codes = torch.empty_like(permuted)
        codes[:, factor.order] = permuted
        return pack_pairs(codes.reshape(-1)), scale_codes, costs
