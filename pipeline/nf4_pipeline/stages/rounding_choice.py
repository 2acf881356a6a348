"""Where weights are rounded, on the processors or on GPUs: by an estimate of both times.

The bytes are the same anywhere. Reading, hashing and writing stay with the processors, so that a
GPU saves a part of their work, and it has to be started first: with many processors, or for a small
checkpoint, that takes longer than everything else.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from nf4_pipeline.machine import cuda_has_begun, may_have_cuda
from nf4_pipeline.nf4.rounding import NearestOnCpu, Rounding
from nf4_pipeline.progress import SILENT, Reporter

# Measured with falcon-7b's shapes; docs/performance.md says on what ("On the cores or on the GPU").
_ON_PROCESSORS: Final = 2.6  # seconds of one processor for 1 GB of the source
_BESIDE_CUDA: Final = 1.2  # the same where a GPU rounds
_LEAST_WITH_CUDA: Final = 0.14  # seconds for 1 GB, however many processors there are
_START_OF_CUDA: Final = 5.0  # seconds: imports, the device, the kernel


@dataclass(frozen=True)
class Estimate:
    """How long quantizing takes where nothing waits for a disk.

    Attributes:
        cpu: seconds on the processors alone.
        cuda: seconds with GPUs, what is left of starting CUDA included.
    """

    cpu: float
    cuda: float

    @property
    def cuda_pays(self) -> bool:
        return self.cuda < self.cpu

    def __str__(self) -> str:
        chosen = "GPU" if self.cuda_pays else "CPU"
        return (
            f"Quantizing on the {chosen}: it would take about {self.cpu:.1f} s on the CPU and "
            f"{self.cuda:.1f} s on the GPU, CUDA's start included."
        )


def estimate(source_bytes: int, processors: int, *, cuda_begun: bool) -> Estimate:
    """Estimates both times.

    Args:
        source_bytes: of the weights that are read.
        processors: that this process may use.
        cuda_begun: this process has started CUDA already.
    """
    gigabytes = source_bytes / 1e9
    start = 0.0 if cuda_begun else _START_OF_CUDA
    return Estimate(
        cpu=gigabytes * _ON_PROCESSORS / processors,
        cuda=start + gigabytes * max(_BESIDE_CUDA / processors, _LEAST_WITH_CUDA),
    )


def rounding_for(device: str, source_bytes: int, reporter: Reporter = SILENT) -> Rounding:
    """Where weights are rounded. The bytes are the same anywhere; only the time differs.

    Args:
        device: "cpu", "cuda" or "cuda:N"; "auto" takes GPUs where they are faster by `estimate`.
        source_bytes: of the weights that will be read.
        reporter: told what was decided.

    Raises:
        ResourceError: a CUDA device was asked for that this machine does not have.
    """
    if device == "cpu" or (device == "auto" and not may_have_cuda()):
        return NearestOnCpu()
    if device == "auto":
        processors = len(os.sched_getaffinity(0))
        both = estimate(source_bytes, processors, cuda_begun=cuda_has_begun())
        reporter.detail(str(both))
        if not both.cuda_pays:
            return NearestOnCpu()
    from nf4_pipeline.runtime.loader import cuda_devices

    devices = cuda_devices(device)
    if not devices:
        return NearestOnCpu()
    from nf4_pipeline.nf4.cuda import NearestOnCuda

    return NearestOnCuda(devices)
