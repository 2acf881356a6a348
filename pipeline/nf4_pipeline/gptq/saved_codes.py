"""What was chosen, in files; and as the engine's rounding, which does not know the difference.

A file holds three tensors for each weight: `NAME:codes`, `NAME:scales` and `NAME:nested`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from nf4_pipeline.gptq import kernels_cpu
from nf4_pipeline.gptq.quantizer import QuantizedWeight
from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.double_quant import NestedScales
from nf4_pipeline.nf4.float_bits import float32_of
from nf4_pipeline.nf4.packing import blocks_of, packed_bytes
from nf4_pipeline.nf4.rounding import RoundedWeight, Rounding, WeightRounding, relative_rmse


def tensors_of(name: str, weight: QuantizedWeight) -> dict[str, NDArray[Any]]:
    """What a file holds of a weight, by name."""
    return {
        f"{name}:codes": weight.packed,
        f"{name}:scales": weight.scales.codes,
        f"{name}:nested": weight.scales.absmax,
    }


def read_codes(path: Path, name: str) -> tuple[NDArray[np.uint8], NestedScales]:
    """A weight's packed codes, uint8 [ceil(n / 2)], and its scales."""
    file: Any = safe_open(path, framework="np")
    return file.get_tensor(f"{name}:codes"), _scales(file, name)


def _scales(file: Any, name: str) -> NestedScales:
    codes, absmax = file.get_tensor(f"{name}:scales"), file.get_tensor(f"{name}:nested")
    return NestedScales(codes, absmax, np.float32(0.0))


class PrecomputedRounding:
    """Codes and scales that stand in files; weights that are in none are rounded as usual.

    Args:
        files: name of a weight -> the file that holds its codes and scales.
        fallback: rounds the others, and lends its buffers.
    """

    def __init__(self, files: Mapping[str, Path], fallback: Rounding) -> None:
        self.workers = fallback.workers
        self.max_chunk_bytes = fallback.max_chunk_bytes
        self._files = files
        self._fallback = fallback

    def buffer(self, nbytes: int) -> NDArray[np.uint8]:
        """See `nf4_pipeline.nf4.rounding.Rounding`."""
        return self._fallback.buffer(nbytes)

    def start_weight(self, name: str, weights: int) -> WeightRounding:
        """See `nf4_pipeline.nf4.rounding.Rounding`."""
        if name in self._files:
            return _PrecomputedWeight(self._files[name], name, weights)
        return self._fallback.start_weight(name, weights)


class _PrecomputedWeight:
    """One weight; its codes are read as they are wanted."""

    def __init__(self, path: Path, name: str, weights: int) -> None:
        self._file: Any = safe_open(path, framework="np")
        self._codes: Any = self._file.get_slice(f"{name}:codes")  # type: ignore[no-untyped-call]
        self._nested = _scales(self._file, name)
        self._scales = self._nested.scales()
        self._sums = np.empty((blocks_of(weights), 2), np.float64)
        self._lock = threading.Lock()

    def quantize_chunk(
        self, bits: NDArray[Any], dtype: str, start: int, packed: NDArray[np.uint8]
    ) -> int | None:
        """See `nf4_pipeline.nf4.rounding.WeightRounding`."""
        values = float32_of(bits, dtype)
        finite = np.isfinite(values)
        if not finite.all():
            return int(np.argmin(finite)) // BLOCK_SIZE
        place = packed_bytes(start)
        with self._lock:
            packed[:] = self._codes[place : place + packed.size]
        first = start // BLOCK_SIZE
        blocks = slice(first, first + blocks_of(bits.size))
        kernels_cpu.block_errors(values, packed, self._scales[blocks], self._sums[blocks])
        return None

    def finish(self) -> RoundedWeight:
        """See `nf4_pipeline.nf4.rounding.WeightRounding`."""
        # One addition after the other: NumPy's own sum depends on the processor.
        error, energy = (float(np.add.accumulate(column)[-1]) for column in self._sums.T)
        return RoundedWeight(self._nested, relative_rmse(error, energy))
