"""Rounding to nearest on CUDA devices, through bitsandbytes' kernel.

A worker's chunk goes to a device on the worker's own stream, so copies of several workers overlap.
The arithmetic runs on one stream per device, one chunk at a time: the kernel takes some 175 GB/s,
far more than any disk gives, and so its temporaries exist only once.

bitsandbytes' kernels agree with its CPU code on all codes for bfloat16 and float16. For float32
they do not (2 of 20 million codes differed), so float32 is rounded on the CPU, which is the
standard. The sums are formed in the order of `pipeline.nf4.cpu`, by operations that IEEE 754
defines to the bit, so that they are the same numbers, too.
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
from pipeline.nf4.layout import blocks_of

_LANES: Final = 16
_SLICE_BLOCKS: Final = 8192  # of the sums' temporaries: half a million weights, 2 MiB each
_WORKERS_PER_DEVICE: Final = 8  # enough to keep a disk busy; each holds a chunk on the device
_SMALLEST: Final = 1e-38
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
        sums: NDArray[np.float32],
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
            codes, scales, terms = lane.round(on_device, stream)
            torch.from_numpy(packed).copy_(codes.view(-1)[: packed.size], non_blocking=True)
            torch.from_numpy(absmax).copy_(scales, non_blocking=True)
            torch.from_numpy(sums).copy_(terms, non_blocking=True)
            stream.synchronize()
        finite = np.isfinite(sums[:, 0])
        return -1 if finite.all() else int(np.argmin(finite))


class _Device:
    """One device, its arithmetic stream, and the lock that gives it to one chunk at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._levels = torch.from_numpy(NF4_LEVELS).to(device)

    def round(
        self, weights: torch.Tensor, arrived: torch.cuda.Stream
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, scales and sums of a chunk, ready for work that is queued on `arrived`."""
        with self._lock:
            self._stream.wait_stream(arrived)
            with torch.cuda.stream(self._stream):
                codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(
                    weights, BLOCK_SIZE, "nf4", torch.uint8
                )
                terms = self._sums(weights, codes.view(-1), scales)
            arrived.wait_stream(self._stream)
            for tensor in (weights, codes, scales, terms):
                tensor.record_stream(arrived)
            weights.record_stream(self._stream)
        return codes, scales, terms

    def _sums(
        self, weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        """E, C and L of every block, float32 [blocks, 3]; see `cpu.quantize_blocks`."""
        whole = weights.numel() // BLOCK_SIZE
        terms = torch.empty((blocks_of(weights.numel()), 3), device=self.device)
        for first in range(0, whole, _SLICE_BLOCKS):
            last = min(first + _SLICE_BLOCKS, whole)
            values = weights[first * BLOCK_SIZE : last * BLOCK_SIZE].float().view(-1, BLOCK_SIZE)
            x = values * scales[first:last, None].clamp(min=_SMALLEST).reciprocal()
            packed = codes[first * BLOCK_SIZE // 2 : last * BLOCK_SIZE // 2]
            terms[first:last] = self._fold(x, packed)
        if whole < len(terms):  # a ragged last block, padded as on the CPU
            tail = weights[whole * BLOCK_SIZE :].float()
            x = torch.zeros((1, BLOCK_SIZE), device=self.device)
            x[0, : tail.numel()] = tail / scales[whole].clamp(min=_SMALLEST)
            packed = torch.full((BLOCK_SIZE // 2,), 0x77, dtype=torch.uint8, device=self.device)
            rest = codes[whole * BLOCK_SIZE // 2 :]
            packed[: rest.numel()] = rest
            terms[whole:] = self._fold(x, packed)
        return terms

    def _fold(self, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """Sums of x^2, x * level and level^2 in the order of `pipeline.nf4.cpu`."""
        index = torch.stack((packed >> 4, packed & 0x0F), dim=-1).view(-1).int()
        level = self._levels[index].view(-1, BLOCK_SIZE)
        folded = []
        for product in (x * x, x * level, level * level):
            rows = product.view(-1, BLOCK_SIZE // _LANES, _LANES)
            lanes = rows[:, 0] + rows[:, 1]
            for row in range(2, BLOCK_SIZE // _LANES):
                lanes = lanes + rows[:, row]
            lanes = lanes[:, :8] + lanes[:, 8:]
            lanes = lanes[:, :4] + lanes[:, 4:]
            even = lanes[:, 0] + lanes[:, 2]
            folded.append(even + (lanes[:, 1] + lanes[:, 3]))
        return torch.stack(folded, dim=-1)
