"""What the machine gives to the work. Nothing here shapes a byte (`recipe.py` does)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

DEFAULT_MEMORY_BUDGET: Final = 256 * 2**20


@dataclass(frozen=True)
class Machine:
    """What the work may use.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N".
        require_gpu: verifying without a GPU is a failure.
        workers: threads that quantize; 0 for as many as keep the device busy.
        memory_budget: bytes for all buffers of the engine together.
        device_memory: bytes of the device that verifying may use; 0 for all that is free.
    """

    device: str = "auto"
    require_gpu: bool = False
    workers: int = 0
    memory_budget: int = DEFAULT_MEMORY_BUDGET
    device_memory: int = 0


def may_have_cuda() -> bool:
    """False where there can be no CUDA device; known without importing torch."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
