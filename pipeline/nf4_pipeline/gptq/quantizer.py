"""A weight and the factor of its Hessian -> codes and scales, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from nf4_pipeline.gptq import kernels_cpu
from nf4_pipeline.gptq.config import GptqConfig
from nf4_pipeline.gptq.hessian import HessianFactor
from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.double_quant import NestedScales
from nf4_pipeline.nf4.packing import blocks_of, pack

_PART: Final = 64 * 1024  # weights that one thread rounds at a time, at least one row


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes and scales of one weight.

    Attributes:
        packed: two codes a byte, uint8 [ceil(n / 2)].
        scales: as they are stored; their offset is 0.
        cost: tr((W - Q) H (W - Q)^T), with H as it was factorized.
    """

    packed: NDArray[np.uint8]
    scales: NestedScales
    cost: float


class GptqOnCpu:
    """Rounds rows side by side; the result does not depend on how many threads there are.

    Args:
        config: what is tried.
        pool: its threads.
    """

    def __init__(self, config: GptqConfig, pool: Executor) -> None:
        self._config = config
        self._pool = pool

    def quantize(
        self,
        rows: Sequence[torch.Tensor],
        factors: Sequence[HessianFactor],
        limits: NDArray[np.float32],
    ) -> QuantizedWeight:
        """See `nf4_pipeline.gptq.quantizers.GptqQuantizer`."""
        weight, factor = rows[0] if len(rows) == 1 else torch.cat(list(rows)), factors[0]
        start = self._start_scales(weight, factor, limits)
        nested = kernels_cpu.nested_absmax(start)
        codes = np.empty(tuple(weight.shape), np.uint8)
        if weight.shape[1] % BLOCK_SIZE == 0:
            scale_codes, cost = self._whole_blocks(weight, factor, start, limits, nested, codes)
        else:
            scale_codes = kernels_cpu.scale_codes(start, nested, limits)
            cost = self._ragged(weight, factor, _nested_scales(scale_codes, nested), codes)
        return QuantizedWeight(pack(codes), _nested_scales(scale_codes, nested), cost)

    def _start_scales(
        self, weight: torch.Tensor, factor: HessianFactor, limits: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        columns = weight.shape[1]
        flat = weight.reshape(-1)
        diagonal = factor.diagonal.numpy()
        scales = np.empty(blocks_of(flat.numel()), np.float32)
        config = self._config

        def part(first: int) -> None:
            values = flat[first : first + _PART].float().numpy()
            place = slice(first // BLOCK_SIZE, first // BLOCK_SIZE + blocks_of(values.size))
            kernels_cpu.start_scales(
                values,
                first,
                columns,
                diagonal,
                config.scale_candidates,
                config.signs,
                limits[place],
                scales[place],
            )

        list(self._pool.map(part, range(0, flat.numel(), _PART)))
        return scales

    def _whole_blocks(
        self,
        weight: torch.Tensor,
        factor: HessianFactor,
        start: NDArray[np.float32],
        limits: NDArray[np.float32],
        nested: NDArray[np.float32],
        codes: NDArray[np.uint8],
    ) -> tuple[NDArray[np.uint8], float]:
        """Fills `codes`; returns the scales' 8-bit codes [blocks] and the cost."""
        order = factor.order.numpy()
        blocks = order[::BLOCK_SIZE] // BLOCK_SIZE
        start, limits = (
            rearrange(each, "(row block) -> row block", row=len(weight)) for each in (start, limits)
        )
        scale_codes = np.empty(start.shape, np.uint8)
        config = self._config
        candidates = config.scale_candidates
        if not config.refine_scales:
            candidates = candidates[:0]

        def part(first: int, last: int) -> float:
            values = _permuted(weight[first:last], order)
            own = np.empty(values.shape, np.uint8)
            cost = kernels_cpu.round_rows(
                values,
                factor.factor.numpy(),
                blocks,
                first,
                start[first:last],
                limits[first:last],
                nested,
                candidates,
                config.signs,
                own,
                scale_codes[first:last],
            )
            codes[first:last, order] = own
            return cost

        return scale_codes.reshape(-1), sum(self._over_rows(codes.shape, part))

    def _ragged(
        self,
        weight: torch.Tensor,
        factor: HessianFactor,
        scales: NestedScales,
        codes: NDArray[np.uint8],
    ) -> float:
        """Fills `codes` of a weight whose blocks run on from row to row; returns the cost."""
        order = factor.order.numpy()
        as_read = scales.scales()

        def part(first: int, last: int) -> float:
            values = _permuted(weight[first:last], order)
            own = np.empty(values.shape, np.uint8)
            cost = kernels_cpu.round_ragged(
                values, factor.factor.numpy(), order, first, as_read, own
            )
            codes[first:last, order] = own
            return cost

        return sum(self._over_rows(codes.shape, part))

    def _over_rows(
        self, shape: tuple[int, ...], part: Callable[[int, int], float]
    ) -> Iterable[float]:
        rows, columns = shape
        step = max(1, _PART // columns)
        starts = range(0, rows, step)
        return self._pool.map(part, starts, (min(first + step, rows) for first in starts))


def _permuted(rows: torch.Tensor, order: NDArray[np.int64]) -> NDArray[np.float32]:
    """A float32 copy with the columns in another order."""
    values: NDArray[Any] = rows.float().numpy()
    return np.ascontiguousarray(values[:, order])


def _nested_scales(codes: NDArray[np.uint8], nested: NDArray[np.float32]) -> NestedScales:
    return NestedScales(codes, nested, np.float32(0))
