"""A weight and its guide -> codes and scales, on a CUDA device."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import TYPE_CHECKING

import numpy as np
import torch
from nf4_pipeline.gptq import kernels_cpu as compensated
from nf4_pipeline.gptq.config import Method
from nf4_pipeline.gptq.hessian import Guide
from nf4_pipeline.gptq.quantizer import Choice, ChooserOnCpu
from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.double_quant import NestedScales

if TYPE_CHECKING:
    from nf4_pipeline.gptq.kernels_triton import Tables


class ChooserOnCuda:
    """Rounds all rows at once; for the same guide the result is that of the CPU, bit for bit.

    Args:
        method: what is tried.
        device: such as "cuda:0".
        pool: threads of the CPU, for weights whose rows are not whole blocks.
    """

    def __init__(self, method: Method, device: str, pool: Executor) -> None:
        from nf4_pipeline.gptq.kernels_triton import Tables

        self._method = method
        self._ragged = ChooserOnCpu(method, pool)
        self._tables: Tables = Tables(torch.device(device))
        self._shares = torch.from_numpy(method.shares).to(device)

    def choose(self, weight: torch.Tensor, guide: Guide) -> Choice:
        """See `nf4_pipeline.gptq.quantizer.Chooser`."""
        with torch.cuda.device(weight.device):
            return self._choose(weight, guide)

    def _choose(self, weight: torch.Tensor, guide: Guide) -> Choice:
        from nf4_pipeline.gptq import kernels_triton as triton

        if weight.shape[1] % BLOCK_SIZE or not self._method.in_loop:
            on_host = Guide(guide.order.cpu(), guide.factor.cpu(), guide.importance.cpu())
            return self._ragged.choose(weight.cpu(), on_host)
        limit = torch.finfo(weight.dtype).max
        signs, tables = self._method.signs, self._tables
        weight = weight.contiguous()
        scales = triton.start_scales(weight, guide.importance, self._shares, signs, limit, tables)
        nested = compensated.nested_absmax(scales.cpu().numpy())
        codes, chosen, costs = triton.round_rows(
            weight.float()[:, guide.order].contiguous(),
            guide.factor,
            (guide.order[::BLOCK_SIZE] // BLOCK_SIZE).tolist(),
            scales,
            torch.from_numpy(nested).to(weight.device),
            self._shares,
            signs,
            tables,
        )
        in_place = torch.empty_like(codes)
        in_place[:, guide.order] = codes
        pairs = in_place.reshape(-1)
        return Choice(
            (pairs[0::2] << 4 | pairs[1::2]).cpu().numpy(),
            NestedScales(chosen.cpu().numpy(), nested, np.float32(0)),
            float(costs.double().sum()),
        )
