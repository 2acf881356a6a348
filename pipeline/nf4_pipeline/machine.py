"""What the machine gives to the work. Nothing here shapes a byte (`recipe.py` does)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
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


def kind_of_device(device: str) -> str:
    """ "cpu" or "cuda": what a choice stands for on this machine, known without importing torch.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
    """
    if device != "auto":
        return device.partition(":")[0]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")
    return "cuda" if may_have_cuda() and not hidden and _torch_knows_cuda() else "cpu"


def _torch_knows_cuda() -> bool:
    """Whether the torch that is installed was built for CUDA; it says so in a file of its own."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return False
    try:
        said = (Path(torch.origin).with_name("version.py")).read_text("utf-8")
    except OSError:
        return True  # nobody knows: it is asked where it is used
    return re.search(r"^cuda\b[^=]*= *['\"]", said, re.MULTILINE) is not None
