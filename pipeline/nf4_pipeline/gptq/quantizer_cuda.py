"""A weight and the factor of its Hessian -> codes and scales, on a CUDA device."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import TYPE_CHECKING

import numpy as np
import torch

from nf4_pipeline.gptq import kernels_cpu
from nf4_pipeline.gptq.config import GptqConfig
from nf4_pipeline.gptq.hessian import HessianFactor
from nf4_pipeline.gptq.quantizer import GptqOnCpu, QuantizedWeight
from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.double_quant import NestedScales
from nf4_pipeline.nf4.packing import pack_pairs

if TYPE_CHECKING:
    from nf4_pipeline.gptq.kernels_triton import Tables


class GptqOnCuda:
    """Rounds all rows at once; for the same factor the result is that of the CPU, bit for bit.

    Args:
        config: what is tried.
        device: such as "cuda:0".
        pool: threads of the CPU, for weights whose rows are not whole blocks.
    """

    def __init__(self, config: GptqConfig, device: str, pool: Executor) -> None:
        from nf4_pipeline.gptq.kernels_triton import Tables

        self._config = config
        self._on_cpu = GptqOnCpu(config, pool)
        self._tables: Tables = Tables(torch.device(device))
        self._candidates = torch.from_numpy(config.scale_candidates).to(device)

    def quantize(
        self, weight: torch.Tensor, factor: HessianFactor, dtype: torch.dtype | None = None
    ) -> QuantizedWeight:
        """See `nf4_pipeline.gptq.quantizer.GptqQuantizer`."""
        if weight.shape[1] % BLOCK_SIZE or not self._config.refine_scales:
            return self._on_cpu.quantize(weight.cpu(), factor.cpu(), dtype)
        limit = torch.finfo(dtype or weight.dtype).max
        with torch.cuda.device(weight.device):
            return self._whole_blocks(weight.contiguous(), factor, limit)

    def _whole_blocks(
        self, weight: torch.Tensor, factor: HessianFactor, limit: float
    ) -> QuantizedWeight:
        from nf4_pipeline.gptq import kernels_triton

        signs, tables = self._config.signs, self._tables
        start = kernels_triton.start_scales(
            weight, factor.diagonal, self._candidates, signs, limit, tables
        )
        nested = kernels_cpu.nested_absmax(start.cpu().numpy())
        permuted, scale_codes, costs = kernels_triton.round_rows(
            weight.float()[:, factor.order].contiguous(),
            factor.factor,
            (factor.order[::BLOCK_SIZE] // BLOCK_SIZE).tolist(),
            start,
            torch.from_numpy(nested).to(weight.device),
            self._candidates,
            signs,
            tables,
        )
        codes = torch.empty_like(permuted)
        codes[:, factor.order] = permuted
        return QuantizedWeight(
            pack_pairs(codes.reshape(-1)).cpu().numpy(),
            NestedScales(scale_codes.cpu().numpy(), nested, np.float32(0)),
            float(costs.double().sum()),
        )
