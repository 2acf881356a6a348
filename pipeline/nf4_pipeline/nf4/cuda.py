"""Rounding to nearest on CUDA devices, through bitsandbytes' kernel.

A worker's chunk goes to a device on the worker's own stream, so copies of several workers overlap.
The kernel takes some 175 GB/s, far more than any disk gives, so one chunk at a time is rounded.

bitsandbytes' CUDA kernels give the codes of its CPU code for bfloat16 and float16, but not for
blocks of zeros or of nearly subnormal weights; for float32 they differ in 2 of 20 million codes.
The CPU result is the standard (and so that the bytes are the same everywhere), so a chunk that
holds any of these is rounded on the CPU.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from typing import Any, Final

import bitsandbytes  # noqa: F401  # registers its operators
import numpy as np
import torch
from numpy.typing import NDArray

from nf4_pipeline.nf4 import BLOCK_SIZE, cpu
from nf4_pipeline.nf4.codebook import NF4_LEVELS
from nf4_pipeline.nf4.error_sums_triton import block_sums
from nf4_pipeline.nf4.float_bits import tensor_of
from nf4_pipeline.nf4.rounding import NearestWeight

_DTYPES: Final = ("bfloat16", "float16")
_WORKERS_PER_DEVICE: Final = 8  # enough to keep a disk busy; each holds a chunk on the device
_MAX_CHUNK: Final = 8 * 2**20  # enough that starting a kernel does not matter
_TRUSTED: Final = np.float32(2.0**-96)
"""Smallest scale for which the kernel's arithmetic is that of the CPU: no subnormal comes near."""


class NearestOnCuda:
    """Round to nearest on one CUDA device, or on several of one host in turn.

    Args:
        devices: such as ["cuda:0"].
    """

    def __init__(self, devices: list[str]) -> None:
        self.workers = _WORKERS_PER_DEVICE * len(devices)
        self.max_chunk_bytes = _MAX_CHUNK
        self._devices = [_Device(torch.device(name)) for name in devices]
        self._turn = itertools.count()
        self._worker = threading.local()

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
        if dtype in _DTYPES and bits.size % BLOCK_SIZE == 0 and bits.size > 0:
            if not hasattr(self._worker, "lane"):
                device = self._devices[next(self._turn) % len(self._devices)]
                self._worker.lane = _Lane(device)
            if self._worker.lane.quantize(tensor_of(bits, dtype), packed, absmax, sums):
                return None
        return cpu.quantize_blocks(bits, dtype, packed, absmax, sums)


class _Device:
    """One device, and the lock that gives its arithmetic to one chunk at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = threading.Lock()
        self.levels = torch.from_numpy(NF4_LEVELS).to(device)
        # bitsandbytes launches its kernel on the default stream, whatever the current one is.
        self.stream = torch.cuda.default_stream(device)


@dataclass
class _Staging:
    """Pinned memory for the scales and sums of a chunk."""

    absmax: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def of(cls, blocks: int) -> _Staging:
        return cls(
            torch.empty(blocks, dtype=torch.float32, pin_memory=True),
            torch.empty((blocks, 3), dtype=torch.int32, pin_memory=True),
        )


class _Lane:
    """One worker's way through a device: its own stream for copies, its own staging memory."""

    def __init__(self, device: _Device) -> None:
        self._on = device
        self._copies = torch.cuda.Stream(device.device)  # type: ignore[no-untyped-call]
        self._staging = _Staging.of(0)

    def quantize(
        self,
        on_host: torch.Tensor,
        packed: NDArray[np.uint8],
        absmax: NDArray[np.float32],
        sums: NDArray[np.int32],
    ) -> bool:
        """Rounds a chunk of whole blocks; False if the CPU has to do it."""
        blocks = absmax.size
        if len(self._staging.absmax) < blocks:
            self._staging = _Staging.of(blocks)
        staged_absmax, staged_sums = self._staging.absmax[:blocks], self._staging.sums[:blocks]
        with torch.cuda.device(self._on.device), torch.cuda.stream(self._copies):
            weights = on_host.to(self._on.device, non_blocking=True)
            codes, scales, terms = self._round(weights)
            torch.from_numpy(packed).copy_(codes.view(-1), non_blocking=True)
            staged_absmax.copy_(scales, non_blocking=True)
            staged_sums.copy_(terms, non_blocking=True)
            self._copies.synchronize()
        absmax[:] = staged_absmax.numpy()
        sums[:] = staged_sums.numpy()
        finite = float(absmax.max()) < np.inf and int(sums[:, 0].min()) >= 0
        return finite and float(absmax.min()) >= float(_TRUSTED)

    def _round(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, scales and sums of a chunk, ready for work that is queued on the copy stream."""
        arithmetic = self._on.stream
        with self._on.lock:
            arithmetic.wait_stream(self._copies)
            with torch.cuda.stream(arithmetic):
                codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(
                    weights, BLOCK_SIZE, "nf4", torch.uint8
                )
                terms = torch.empty((len(scales), 3), dtype=torch.int32, device=weights.device)
                block_sums(weights, codes, scales, self._on.levels, terms)
            self._copies.wait_stream(arithmetic)
            weights.record_stream(arithmetic)
            for tensor in (codes, scales, terms):
                tensor.record_stream(self._copies)
        return codes, scales, terms
