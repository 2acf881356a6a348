"""The seam: how codes and scales are chosen. Reader, writer and layout know nothing else of it."""

from __future__ import annotations

import os
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.nf4 import cpu


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

    def quantize(
        self,
        bits: NDArray[Any],
        dtype: str,
        packed: NDArray[np.uint8],
        absmax: NDArray[np.float32],
        sums: NDArray[np.int32],
    ) -> int:
        """Rounds one chunk of whole blocks; see `pipeline.nf4.cpu.quantize_blocks`.

        Called from several threads at once. Returns -1, or the first block that is not finite.
        """


class NearestOnCpu:
    """Round to nearest with the block's absolute maximum as its scale, as bitsandbytes does."""

    def __init__(self) -> None:
        # One more than the processors, so that one can wait for the disk.
        self.workers = len(os.sched_getaffinity(0)) + 1
        self.max_chunk_bytes = 2 * 2**20  # stays in a core's cache from reading to writing

    def buffer(self, nbytes: int) -> NDArray[np.uint8]:
        return np.empty(nbytes, np.uint8)

    def quantize(
        self,
        bits: NDArray[Any],
        dtype: str,
        packed: NDArray[np.uint8],
        absmax: NDArray[np.float32],
        sums: NDArray[np.int32],
    ) -> int:
        return cpu.quantize_blocks(bits, dtype, packed, absmax, sums)
