"""The seam: how codes and scales are chosen. Reader, writer and layout know nothing else of it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import sqrt
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.double_quant import NestedScales, double_quantize
from nf4_pipeline.nf4.packing import blocks_of

ChunkRounder = Callable[
    [NDArray[Any], str, NDArray[np.uint8], NDArray[np.float32], NDArray[np.int32]], int | None
]
"""Rounds whole blocks to nearest; see `nf4_pipeline.nf4.cpu.quantize_blocks`."""


@dataclass(frozen=True)
class RoundedWeight:
    """What is known of a weight once all its codes are chosen.

    Attributes:
        scales: as they are stored.
        relative_rmse: sqrt(sum (w - w')^2 / sum w^2), where w' is what readers compute in float32.
    """

    scales: NestedScales
    relative_rmse: float


class WeightRounding(Protocol):
    """One weight while its chunks come and go, in any order, from several threads at once."""

    def quantize_chunk(
        self, bits: NDArray[Any], dtype: str, start: int, packed: NDArray[np.uint8]
    ) -> int | None:
        """Chooses the codes of one chunk of whole blocks.

        Args:
            bits: the weights' bits, [n]: uint16 for "bfloat16" and "float16", uint32 for "float32".
            dtype: what the bits mean.
            start: the place of the first of them in the weight; a multiple of 64.
            packed: receives two codes a byte, [ceil(n / 2)].

        Returns:
            None, or the first block of the chunk that holds an infinity or a NaN.
        """

    def finish(self) -> RoundedWeight:
        """Called once, after the last chunk."""


class Rounding(Protocol):
    """Chooses a code for each weight and a scale for each block of 64.

    Attributes:
        workers: how many threads keep it busy.
        max_chunk_bytes: beyond which a chunk only costs memory.
    """

    workers: int
    max_chunk_bytes: int

    def buffer(self, nbytes: int) -> NDArray[np.uint8]:
        """Memory to read a chunk into, or to leave codes in: wherever this rounding likes it."""

    def start_weight(self, name: str, weights: int) -> WeightRounding:
        """Starts a weight of that many elements; `name` is what it is called in the output."""


_MANY_PROCESSORS: Final = 8
"""From so many on, processors are as fast as most disks, and threads wait for each other."""


class NearestOnCpu:
    """Round to nearest with the block's absolute maximum as its scale, as bitsandbytes does."""

    def __init__(self) -> None:
        # One more than the processors, so that one can wait for the disk; of many, a quarter is
        # left to the threads that hash files.
        processors = len(os.sched_getaffinity(0))
        self.workers = processors + 1 - processors // 4
        # More leaves the cache; but many threads wait for each other at every step in Python.
        self.max_chunk_bytes = (4 if processors < _MANY_PROCESSORS else 8) * 2**20

    def buffer(self, nbytes: int) -> NDArray[np.uint8]:
        return np.empty(nbytes, np.uint8)

    def start_weight(self, name: str, weights: int) -> WeightRounding:
        from nf4_pipeline.nf4 import cpu  # and numba: half a second, only for who rounds

        return NearestWeight(cpu.quantize_blocks, weights)


class NearestWeight:
    """A weight that is rounded to nearest.

    Args:
        rounder: rounds a chunk, wherever that is done.
        weights: how many the weight has.
    """

    def __init__(self, rounder: ChunkRounder, weights: int) -> None:
        self._rounder = rounder
        blocks = blocks_of(weights)
        self._absmax = _mapped(blocks, np.float32)
        self._sums = _mapped(3 * blocks, np.int32).reshape(blocks, 3)

    def quantize_chunk(
        self, bits: NDArray[Any], dtype: str, start: int, packed: NDArray[np.uint8]
    ) -> int | None:
        """See `WeightRounding`."""
        first = start // BLOCK_SIZE
        blocks = slice(first, first + blocks_of(bits.size))
        return self._rounder(bits, dtype, packed, self._absmax[blocks], self._sums[blocks])

    def finish(self) -> RoundedWeight:
        """All blocks are rounded: the scales are rounded in turn."""
        from nf4_pipeline.nf4 import cpu

        nested = double_quantize(self._absmax)
        error, energy = cpu.squared_error(self._absmax, self._sums, nested.scales())
        return RoundedWeight(nested, relative_rmse(error, energy))


def relative_rmse(error: float, energy: float) -> float:
    """The root of the error's share of the energy, in four digits: what the sums can promise."""
    return float(f"{sqrt(error / energy):.4g}") if energy else 0.0


def _mapped(count: int, dtype: type[np.generic]) -> NDArray[Any]:
    """Zeros that go back to the system when they are let go.

    What a thread takes from its heap the heap keeps, and which thread starts a large weight is a
    matter of chance: the peak memory would be, too.
    """
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    nbytes = max(count * np.dtype(dtype).itemsize, 1)
    mapping = mmap.mmap(-1, nbytes, flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, dtype, count)
