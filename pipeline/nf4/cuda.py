"""Rounding to nearest on CUDA devices, through bitsandbytes' kernel.

A worker's chunk goes to a device on the worker's own stream, so copies of several workers overlap.
The kernel runs on one stream per device: it takes some 175 GB/s, far more than any disk gives.

bitsandbytes' kernels give the codes of its CPU code for bfloat16 and float16, but for blocks of
zeros and ragged last blocks; `cpu.complete_blocks` settles those, and forms the sums while the
chunk is still in the processor's cache. For float32 the kernels disagree (2 of 20 million codes),
so float32 is rounded on the CPU, which is the standard.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.nf4 import BLOCK_SIZE, cpu

_WORKERS_PER_DEVICE: Final = 8  # enough to keep a disk busy; each holds a chunk on the device
_DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class NearestOnCuda:
    """Round to nearest on one CUDA device, or on several of one host in turn.

    Args:
        devices: such as ["cuda:0"].
    """

    def __init__(self, devices: list[str]) -> None:
        import bitsandbytes  # registers its operators  # noqa: F401

        self._lanes = [_Device(torch.device(name)) for name in devices]
        self.workers = _WORKERS_PER_DEVICE * len(devices)
        self._turn = itertools.count()
        self._worker = threading.local()

    def buffer(self, nbytes: int) -> NDArray[np.uint8]:
        """Pinned memory, from which copies to a device run beside everything else."""
        pinned: NDArray[np.uint8] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        return pinned

    def quantize(
        self,
        bits: NDArray[Any],
        dtype: str,
        packed: NDArray[np.uint8],
        absmax: NDArray[np.float32],
        sums: NDArray[np.int32],
    ) -> int:
        """Rounds one chunk; see `pipeline.nf4.rounding.Rounding`."""
        if dtype == "float32":
            return cpu.quantize_blocks(bits, dtype, packed, absmax, sums)
        if not hasattr(self._worker, "lane"):
            lane = self._lanes[next(self._turn) % len(self._lanes)]
            self._worker.lane = lane
            self._worker.stream = torch.cuda.Stream(lane.device)  # type: ignore[no-untyped-call]
        lane, stream = self._worker.lane, self._worker.stream
        weights = torch.from_numpy(bits.view(np.uint8)).view(_DTYPES[dtype])
        with torch.cuda.device(lane.device), torch.cuda.stream(stream):
            on_device = weights.to(lane.device, non_blocking=True)
            codes, scales = lane.round(on_device, stream)
            torch.from_numpy(packed).copy_(codes.view(-1)[: packed.size], non_blocking=True)
            torch.from_numpy(absmax).copy_(scales, non_blocking=True)
            stream.synchronize()
        return cpu.complete_blocks(bits, dtype, packed, absmax, sums)


class _Device:
    """One device, its arithmetic stream, and the lock that gives it to one chunk at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()

    def round(
        self, weights: torch.Tensor, arrived: torch.cuda.Stream
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of a chunk, ready for work that is queued on `arrived`."""
        with self._lock:
            self._stream.wait_stream(arrived)
            with torch.cuda.stream(self._stream):
                codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(
                    weights, BLOCK_SIZE, "nf4", torch.uint8
                )
            arrived.wait_stream(self._stream)
            weights.record_stream(self._stream)
            codes.record_stream(arrived)
            scales.record_stream(arrived)
        return codes, scales
