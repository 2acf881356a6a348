"""What work takes: seconds and peak memory, here and on CUDA devices; and what is free for it."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_CLEAR_REFS: Final = Path("/proc/self/clear_refs")
_MEMINFO: Final = Path("/proc/meminfo")
_STATUS: Final = Path("/proc/self/status")
_RESET_PEAK: Final = "5"  # Linux: forget the peak resident set size so far (proc(5))


@dataclass
class Usage:
    """What a piece of work took; filled when it ends.

    Attributes:
        seconds: wall-clock time.
        peak_memory: largest resident set of this process meanwhile, in bytes.
    """

    seconds: float = 0.0
    peak_memory: int = 0


@contextmanager
def measured() -> Iterator[Usage]:
    """Measures the body."""
    usage = Usage()
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        pass  # not Linux, or not allowed: the peak then counts from the start of the process
    start = time.perf_counter()
    try:
        yield usage
    finally:
        usage.seconds = time.perf_counter() - start
        usage.peak_memory = peak_memory()


@dataclass
class DeviceUsage:
    """What a piece of work took; filled when it ends.

    Attributes:
        seconds: wall-clock time.
        peak_memory: the most that torch's tensors took on one CUDA device meanwhile, in bytes.
    """

    seconds: float = 0.0
    peak_memory: int = 0


@contextmanager
def measured_on_device() -> Iterator[DeviceUsage]:
    """Measures the body; may stand inside `measured`. torch is not imported for it."""
    usage = DeviceUsage()
    if cuda := _cuda_in_use():
        for device in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    try:
        yield usage
    finally:
        usage.seconds = time.perf_counter() - start
        if cuda := _cuda_in_use():
            devices = range(cuda.device_count())
            usage.peak_memory = max(map(cuda.max_memory_allocated, devices), default=0)


def _cuda_in_use() -> Any:
    """`torch.cuda`, or None as long as this process has not used it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def available_memory() -> int | None:
    """Bytes that can be used without swapping, or None where the system does not say."""
    return _bytes_in(_MEMINFO, "MemAvailable:")


def nearest_folder(folder: Path) -> Path:
    """A folder, or the nearest one above it that is there."""
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())


def free_space(folder: Path) -> int:
    """Bytes that are free on the disk where a folder is, or will be."""
    return shutil.disk_usage(nearest_folder(folder)).free


def peak_memory_of_children() -> int:
    """The largest resident set of any child process that has ended, in bytes."""
    return _max_rss(resource.RUSAGE_CHILDREN)


def peak_memory() -> int:
    """The largest resident set of this process in bytes, since the last reset."""
    return _bytes_in(_STATUS, "VmHWM:") or _max_rss(resource.RUSAGE_SELF)


def _bytes_in(path: Path, field: str) -> int | None:
    """A field of a file under /proc, which counts in KiB; None where there is no such field."""
    try:
        for line in path.read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return None


def _max_rss(who: int) -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit
