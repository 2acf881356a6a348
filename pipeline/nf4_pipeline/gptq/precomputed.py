"""What calibration chose, as the engine's rounding: the writer does not know the difference."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nf4_pipeline.gptq import kernels_cpu as compensated
from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.double_quant import NestedScales
from nf4_pipeline.nf4.packing import blocks_of
from nf4_pipeline.nf4.rounding import RoundedWeight, Rounding, WeightRounding, relative_rmse
from numpy.typing import NDArray
from safetensors import safe_open


class Given:
    """Codes and scales that stand in files; weights that are in none are rounded as usual.

    Args:
        files: name of a weight -> the file that holds its choice.
        otherwise: rounds the others, and lends its buffers.
    """

    def __init__(self, files: dict[str, Path], otherwise: Rounding) -> None:
        self.workers = otherwise.workers
        self.max_chunk_bytes = otherwise.max_chunk_bytes
        self._files = files
        self._otherwise = otherwise

    def buffer(self, nbytes: int) -> NDArray[np.uint8]:
        """See `nf4_pipeline.nf4.rounding.Rounding`."""
        return self._otherwise.buffer(nbytes)

    def begin(self, name: str, weights: int) -> WeightRounding:
        """See `nf4_pipeline.nf4.rounding.Rounding`."""
        if name in self._files:
            return _GivenWeight(self._files[name], name, weights)
        return self._otherwise.begin(name, weights)


class _GivenWeight:
    """One weight; its codes are read as they are wanted."""

    def __init__(self, path: Path, name: str, weights: int) -> None:
        self._file: Any = safe_open(path, framework="np")
        self._codes: Any = self._file.get_slice(f"{name}:codes")  # type: ignore[no-untyped-call]
        self._scales = _scales(self._file, name)
        self._read = self._scales.scales()
        self._sums = np.empty((blocks_of(weights), 2), np.float64)
        self._lock = threading.Lock()

    def chunk(self, bits: NDArray[Any], dtype: str, start: int, packed: NDArray[np.uint8]) -> int:
        """See `nf4_pipeline.nf4.rounding.WeightRounding`."""
        values = _values(bits, dtype)
        finite = np.isfinite(values)
        if not finite.all():
            return int(np.argmin(finite)) // BLOCK_SIZE
        with self._lock:
            packed[:] = self._codes[start // 2 : start // 2 + packed.size]
        first = start // BLOCK_SIZE
        blocks = slice(first, first + blocks_of(bits.size))
        compensated.block_errors(values, packed, self._read[blocks], self._sums[blocks])
        return -1

    def finish(self) -> RoundedWeight:
        """See `nf4_pipeline.nf4.rounding.WeightRounding`."""
        # One addition after the other: NumPy's own sum depends on the processor.
        error, energy = (float(np.add.accumulate(column)[-1]) for column in self._sums.T)
        return RoundedWeight(self._scales, relative_rmse(error, energy))


def choices_in(files: dict[str, Path]) -> Iterator[tuple[str, NDArray[np.uint8], NestedScales]]:
    """Each weight's name, packed codes and scales."""
    for name, path in files.items():
        yield name, *choice_in(path, name)


def choice_in(path: Path, name: str) -> tuple[NDArray[np.uint8], NestedScales]:
    """A weight's packed codes and its scales."""
    file: Any = safe_open(path, framework="np")
    return file.get_tensor(f"{name}:codes"), _scales(file, name)


def _scales(file: Any, name: str) -> NestedScales:
    codes, absmax = file.get_tensor(f"{name}:scales"), file.get_tensor(f"{name}:nested")
    return NestedScales(codes, absmax, np.float32(0.0))


def _values(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """The weights in float32, exact."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16 if dtype == "float16" else np.float32).astype(np.float32)
