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
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.nf4 import BLOCK_SIZE, cpu
from pipeline.nf4.codebook import NF4_LEVELS

_DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_WORKERS_PER_DEVICE: Final = 8  # enough to keep a disk busy; each holds a chunk on the device
_MAX_CHUNK: Final = 4 * 2**20  # its temporaries take twelve times as much on the device
_TRUSTED: Final = np.float32(2.0**-96)
"""Smallest scale for which the kernel's arithmetic is that of the CPU: no subnormal comes near."""


class NearestOnCuda:
    """Round to nearest on one CUDA device, or on several of one host in turn.

    Args:
        devices: such as ["cuda:0"].
    """

    def __init__(self, devices: list[str]) -> None:
        import bitsandbytes  # registers its operators  # noqa: F401

        self.workers = _WORKERS_PER_DEVICE * len(devices)
        self.max_chunk_bytes = _MAX_CHUNK
        self._lanes = [_Device(torch.device(name)) for name in devices]
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
        on_device = dtype in _DTYPES and bits.size % BLOCK_SIZE == 0 and bits.size > 0
        if on_device and self._on_device(bits, dtype, packed, absmax, sums):
            return -1
        return cpu.quantize_blocks(bits, dtype, packed, absmax, sums)

    def _on_device(
        self,
        bits: NDArray[Any],
        dtype: str,
        packed: NDArray[np.uint8],
        absmax: NDArray[np.float32],
        sums: NDArray[np.int32],
    ) -> bool:
        """Rounds a chunk of whole blocks; False if the CPU has to do it."""
        if not hasattr(self._worker, "lane"):
            lane = self._lanes[next(self._turn) % len(self._lanes)]
            self._worker.lane = lane
            self._worker.stream = torch.cuda.Stream(lane.device)  # type: ignore[no-untyped-call]
        lane, stream = self._worker.lane, self._worker.stream
        on_host = torch.from_numpy(bits.view(np.uint8)).view(_DTYPES[dtype])
        with torch.cuda.device(lane.device), torch.cuda.stream(stream):
            weights = on_host.to(lane.device, non_blocking=True)
            codes, scales, terms, spoiled = lane.round(weights, stream)
            torch.from_numpy(packed).copy_(codes.view(-1), non_blocking=True)
            torch.from_numpy(absmax).copy_(scales)
            torch.from_numpy(sums).copy_(terms)
            has_nan = bool(spoiled)
            stream.synchronize()
        return not has_nan and bool(np.isfinite(absmax).all() and (absmax >= _TRUSTED).all())


class _Device:
    """One device, its arithmetic stream, and the lock that gives it to one chunk at a time."""

    def __init__(self, device: torch.device) -> None:
        self._lock = threading.Lock()
        self.device = device
        # bitsandbytes launches this kernel on the default stream, whatever the current one is.
        self._stream = torch.cuda.default_stream(device)
        pairs = np.stack((NF4_LEVELS.repeat(16), np.tile(NF4_LEVELS, 16)), axis=-1)
        self._levels = torch.from_numpy(pairs).to(device)
        self._steps = torch.from_numpy(cpu.fixed_levels(pairs)).to(device)

    def round(self, weights: torch.Tensor, arrived: torch.cuda.Stream) -> tuple[torch.Tensor, ...]:
        """Codes, scales and sums of a chunk, and whether it holds a NaN.

        Args:
            weights: [n], n a multiple of the block size.
            arrived: the stream on which they come, and from which the results are taken.
        """
        with self._lock:
            self._stream.wait_stream(arrived)
            with torch.cuda.stream(self._stream):
                codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(
                    weights, BLOCK_SIZE, "nf4", torch.uint8
                )
                terms, spoiled = self._sums(weights, codes.view(-1).int(), scales)
            arrived.wait_stream(self._stream)
            weights.record_stream(self._stream)
            for tensor in (codes, scales, terms, spoiled):
                tensor.record_stream(arrived)
        return codes, scales, terms, spoiled

    def _sums(
        self, weights: torch.Tensor, pairs: torch.Tensor, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `cpu.squared_error` needs, int32 [blocks, 3], in the arithmetic of `cpu`."""
        x = weights.float().view(-1, BLOCK_SIZE)
        x *= scales.reciprocal()[:, None]
        x -= self._levels.index_select(0, pairs).view(-1, BLOCK_SIZE)
        spoiled = x.sum().isnan()
        errors = x.mul_(float(cpu.ERROR_UNIT)).add_(0.5).floor_().int()
        steps = self._steps.index_select(0, pairs).view(-1, BLOCK_SIZE)
        terms = torch.empty((len(scales), 3), dtype=torch.int32, device=self.device)
        for term, (a, b) in enumerate(((errors, errors), (errors, steps), (steps, steps))):
            torch.sum(a * b, dim=1, dtype=torch.int32, out=terms[:, term])
        return terms, spoiled
