"""A weight and its guide -> codes and scales, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from nf4_pipeline.gptq import kernels_cpu as compensated
from nf4_pipeline.gptq.config import Method
from nf4_pipeline.gptq.hessian import Guide
from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.codebook import ZERO_CODE
from nf4_pipeline.nf4.double_quant import NestedScales
from nf4_pipeline.nf4.packing import blocks_of
from numpy.typing import NDArray

_PART: Final = 64 * 1024  # weights that one thread rounds at a time, at least one row


@dataclass(frozen=True)
class Choice:
    """Codes and scales of one weight.

    Attributes:
        packed: two codes a byte, uint8 [ceil(n / 2)].
        scales: as they are stored; their offset is 0.
        cost: tr((W - Q) H (W - Q)^T), with H as the guide has it.
    """

    packed: NDArray[np.uint8]
    scales: NestedScales
    cost: float


class Chooser(Protocol):
    """Chooses codes and scales on one kind of device."""

    def choose(self, weight: torch.Tensor, guide: Guide) -> Choice:
        """Rounds a weight [rows, columns] of any float dtype, on the guide's device."""


class ChooserOnCpu:
    """Rounds rows side by side; the result does not depend on how many threads there are.

    Args:
        method: what is tried.
        pool: its threads.
    """

    def __init__(self, method: Method, pool: Executor) -> None:
        self._method = method
        self._pool = pool

    def choose(self, weight: torch.Tensor, guide: Guide) -> Choice:
        """See `Chooser`."""
        rows, columns = weight.shape
        scales = self._start_scales(weight, guide)
        nested = compensated.nested_absmax(scales)
        order = guide.order.numpy()
        codes = np.empty((rows, columns), np.uint8)
        if columns % BLOCK_SIZE == 0:
            stored, cost = self._by_blocks(weight, guide, scales, nested, codes)
        else:
            stored = compensated.scale_codes(scales, nested)
            read = NestedScales(stored, nested, np.float32(0)).scales()
            factor = guide.factor.numpy()

            def ragged(first: int, last: int) -> float:
                part = _columns(weight[first:last], order)
                chosen = np.empty(part.shape, np.uint8)
                cost = compensated.round_ragged(part, factor, order, first, read, chosen)
                codes[first:last, order] = chosen
                return cost

            cost = sum(self._over_rows(rows, columns, ragged))
        return Choice(pack(codes), NestedScales(stored, nested, np.float32(0)), cost)

    def _start_scales(self, weight: torch.Tensor, guide: Guide) -> NDArray[np.float32]:
        columns = weight.shape[1]
        flat = weight.reshape(-1)
        importance = guide.importance.numpy()
        scales = np.empty(blocks_of(flat.numel()), np.float32)
        method, limit = self._method, torch.finfo(weight.dtype).max

        def part(first: int) -> None:
            values = flat[first : first + _PART].float().numpy()
            place = slice(first // BLOCK_SIZE, first // BLOCK_SIZE + blocks_of(values.size))
            compensated.start_scales(
                values,
                first,
                columns,
                importance,
                method.shares,
                method.signs,
                limit,
                scales[place],
            )

        list(self._pool.map(part, range(0, flat.numel(), _PART)))
        return scales

    def _by_blocks(
        self,
        weight: torch.Tensor,
        guide: Guide,
        scales: NDArray[np.float32],
        nested: NDArray[np.float32],
        codes: NDArray[np.uint8],
    ) -> tuple[NDArray[np.uint8], float]:
        rows, columns = weight.shape
        order, factor = guide.order.numpy(), guide.factor.numpy()
        blocks = order[::BLOCK_SIZE] // BLOCK_SIZE
        start = scales.reshape(rows, -1)
        stored = np.empty(start.shape, np.uint8)
        method = self._method
        shares = method.shares if method.in_loop else method.shares[:0]

        def part(first: int, last: int) -> float:
            values = _columns(weight[first:last], order)
            chosen = np.empty(values.shape, np.uint8)
            cost = compensated.round_rows(
                values,
                factor,
                blocks,
                first,
                start[first:last],
                nested,
                shares,
                method.signs,
                chosen,
                stored[first:last],
            )
            codes[first:last, order] = chosen
            return cost

        return stored.reshape(-1), sum(self._over_rows(rows, columns, part))

    def _over_rows(
        self, rows: int, columns: int, part: Callable[[int, int], float]
    ) -> Iterable[float]:
        step = max(1, _PART // columns)
        starts = range(0, rows, step)
        return self._pool.map(part, starts, (min(first + step, rows) for first in starts))


def _columns(rows: torch.Tensor, order: NDArray[np.int64]) -> NDArray[np.float32]:
    """A float32 copy with the columns in another order."""
    values: NDArray[Any] = rows.float().numpy()
    return np.ascontiguousarray(values[:, order])


def pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two codes a byte, the earlier one in the high half; an odd one out is padded."""
    flat = codes.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(ZERO_CODE))
    packed: NDArray[np.uint8] = np.bitwise_or(flat[0::2] << np.uint8(4), flat[1::2])
    return packed
