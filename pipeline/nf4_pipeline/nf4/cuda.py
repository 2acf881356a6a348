"""Rounding to nearest on CUDA devices.

A chunk goes through one of a device's few slots: a stream of its own, with memory for a chunk. So
one chunk is copied in and another out while a third is rounded, whatever the number of workers, and
a device's memory is that of its slots. A worker that waits for its chunk sleeps: the processors are
for those who read, hash and write.

The kernel's arithmetic is that of the CPU's kernel, but where a scale or its reciprocal is nearly
subnormal. The CPU's result is the standard, so a chunk that holds such a block is rounded there.
"""

from __future__ import annotations

import queue
from itertools import product
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from nf4_pipeline.nf4 import BLOCK_SIZE, cpu
from nf4_pipeline.nf4.codebook import NF4_LEVELS, NF4_MIDPOINTS
from nf4_pipeline.nf4.float_bits import tensor_of
from nf4_pipeline.nf4.rounding import NearestWeight
from nf4_pipeline.nf4.rounding_triton import round_blocks

_WORKERS: Final = 8  # enough to keep a disk busy
_SLOTS_PER_DEVICE: Final = 4
_MAX_CHUNK: Final = 16 * 2**20  # fewer steps in Python, where threads wait for each other
_TRUSTED: Final = np.float32(2.0**-96), np.float32(2.0**96)
"""Between these scales nothing in the kernel comes near a subnormal number."""


class NearestOnCuda:
    """Round to nearest on one CUDA device, or on several of one host in turn.

    Args:
        devices: such as ["cuda:0"].
    """

    def __init__(self, devices: list[str]) -> None:
        self.workers = _WORKERS * len(devices)
        self.max_chunk_bytes = _MAX_CHUNK
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for _, device in product(range(_SLOTS_PER_DEVICE), devices):
            self._free.put(_Slot(torch.device(device)))

    def buffer(self, nbytes: int) -> NDArray[np.uint8]:
        """Pinned memory, from which copies to a device run beside everything else."""
        pinned: NDArray[np.uint8] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        return pinned

    def start_weight(self, name: str, weights: int) -> NearestWeight:
        """See `nf4_pipeline.nf4.rounding.Rounding`."""
        return NearestWeight(self.quantize, weights)

    def quantize(
        self,
        bits: NDArray[Any],
        dtype: str,
        packed: NDArray[np.uint8],
        absmax: NDArray[np.float32],
        sums: NDArray[np.int32],
    ) -> int | None:
        """Rounds one chunk; see `nf4_pipeline.nf4.cpu.quantize_blocks`."""
        if bits.size % BLOCK_SIZE == 0 and bits.size > 0:
            slot = self._free.get()
            try:
                slot.quantize(tensor_of(bits, dtype), packed, absmax, sums)
            finally:
                self._free.put(slot)
            smallest, largest = _TRUSTED
            if absmax.min() >= smallest and absmax.max() <= largest:  # a NaN is neither
                return None
        return cpu.quantize_blocks(bits, dtype, packed, absmax, sums)


class _Slot:
    """A way through a device for one chunk at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._levels = torch.from_numpy(NF4_LEVELS).to(device)
        self._midpoints = torch.from_numpy(NF4_MIDPOINTS).to(device)
        self._make_room(0, 0)

    def _make_room(self, nbytes: int, blocks: int) -> None:
        """Memory for a chunk of that many bytes and blocks."""
        self._weights = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._codes = torch.empty(blocks * BLOCK_SIZE // 2, dtype=torch.uint8, device=self._device)
        # Of each block its scale, then of each block its three sums: one copy takes all of them.
        self._found = torch.empty(4 * blocks, dtype=torch.int32, device=self._device)
        self._staged = torch.empty(4 * blocks, dtype=torch.int32, pin_memory=True)

    def quantize(
        self,
        on_host: torch.Tensor,
        packed: NDArray[np.uint8],
        absmax: NDArray[np.float32],
        sums: NDArray[np.int32],
    ) -> None:
        """Rounds a chunk of whole blocks."""
        blocks = absmax.size
        with torch.cuda.stream(self._stream):
            if self._weights.numel() < on_host.nbytes or self._found.numel() < 4 * blocks:
                self._make_room(on_host.nbytes, blocks)
            weights = self._weights[: on_host.nbytes].view(on_host.dtype)
            codes, found = self._codes[: packed.size], self._found[: 4 * blocks]
            weights.copy_(on_host, non_blocking=True)
            scales, terms = found[:blocks].view(torch.float32), found[blocks:]
            round_blocks(weights, self._levels, self._midpoints, codes, scales, terms)
            torch.from_numpy(packed).copy_(codes, non_blocking=True)
            self._staged[: 4 * blocks].copy_(found, non_blocking=True)
            self._done.record(self._stream)
        self._done.synchronize()
        staged = self._staged.numpy()
        absmax[:] = staged[:blocks].view(np.float32)
        sums[:] = staged[blocks : 4 * blocks].reshape(blocks, 3)
