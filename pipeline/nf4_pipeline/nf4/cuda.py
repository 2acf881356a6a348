"""Rounding to nearest on CUDA devices.

A chunk goes through one of a device's few slots: a stream of its own, with memory for a chunk. So
one chunk is copied in and another out while a third is rounded, whatever the number of workers, and
a device's memory is that of its slots. A worker that waits for its chunk sleeps: the processors are
for those who read, hash and write.

The kernel's arithmetic is that of the CPU's kernel, but where a scale or its reciprocal is nearly
subnormal. The CPU's result is the standard, so a chunk that holds such a block is rounded there.
"""

from __future__ import annotations

import os
import queue
from dataclasses import dataclass
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

_MOST_WORKERS: Final = 16
_WAITING: Final = 2  # workers that wait for a device or a disk while the processors are busy
_SLOTS_PER_DEVICE: Final = 4
_MAX_CHUNK: Final = 8 * 2**20  # more leaves the caches before it is written and hashed
_TRUSTED: Final = np.float32(2.0**-96), np.float32(2.0**96)
"""Between these scales nothing in the kernel comes near a subnormal number."""


class NearestOnCuda:
    """Round to nearest on one CUDA device, or on several of one host in turn.

    Args:
        devices: such as ["cuda:0"].
    """

    def __init__(self, devices: list[str]) -> None:
        self.workers = min(_MOST_WORKERS, len(os.sched_getaffinity(0)) + _WAITING)
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


@dataclass(frozen=True)
class _Room:
    """Where a slot keeps a chunk of one size and dtype.

    Attributes:
        weights: on the device, [n].
        codes: on the device, uint8 [n / 2].
        found: on the device, int32 [4 * blocks]: `scales` and `sums`, so that one copy takes both.
        scales: float32 [blocks].
        sums: int32 [3 * blocks].
        staged: pinned, as `found`.
    """

    weights: torch.Tensor
    codes: torch.Tensor
    found: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor
    staged: torch.Tensor


class _Slot:
    """A way through a device for one chunk at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._levels = torch.from_numpy(NF4_LEVELS).to(device)
        self._midpoints = torch.from_numpy(NF4_MIDPOINTS).to(device)
        self._memory = self._staging = torch.empty(0, dtype=torch.uint8)
        self._rooms: dict[tuple[torch.dtype, int], _Room] = {}

    def quantize(
        self,
        on_host: torch.Tensor,
        packed: NDArray[np.uint8],
        absmax: NDArray[np.float32],
        sums: NDArray[np.int32],
    ) -> None:
        """Rounds a chunk of whole blocks."""
        with torch.cuda.stream(self._stream):
            room = self._room(on_host.dtype, on_host.numel())
            room.weights.copy_(on_host, non_blocking=True)
            round_blocks(
                room.weights, self._levels, self._midpoints, room.codes, room.scales, room.sums
            )
            torch.from_numpy(packed).copy_(room.codes, non_blocking=True)
            room.staged.copy_(room.found, non_blocking=True)
            self._done.record(self._stream)
        self._done.synchronize()
        staged = room.staged.numpy()
        absmax[:] = staged[: absmax.size].view(np.float32)
        sums[:] = staged[absmax.size :].reshape(sums.shape)

    def _room(self, dtype: torch.dtype, count: int) -> _Room:
        """Room for a chunk; most chunks are of one size, and need no steps in Python to find it."""
        room = self._rooms.get((dtype, count))
        if room is None:
            room = self._rooms[dtype, count] = self._make_room(dtype, count)
        return room

    def _make_room(self, dtype: torch.dtype, count: int) -> _Room:
        blocks = count // BLOCK_SIZE
        codes_at = count * dtype.itemsize
        found_at = codes_at + count // 2
        end = found_at + 16 * blocks
        if self._memory.numel() < end or self._staging.numel() < end - found_at:
            self._rooms.clear()  # they are of the smaller memory
            self._memory = torch.empty(end, dtype=torch.uint8, device=self._device)
            self._staging = torch.empty(end - found_at, dtype=torch.uint8, pin_memory=True)
        found = self._memory[found_at:end].view(torch.int32)
        return _Room(
            weights=self._memory[:codes_at].view(dtype),
            codes=self._memory[codes_at:found_at],
            found=found,
            scales=found[:blocks].view(torch.float32),
            sums=found[blocks:],
            staged=self._staging[: end - found_at].view(torch.int32),
        )
