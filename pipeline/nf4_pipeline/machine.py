"""What the machine gives to the work. Nothing here shapes a byte (`recipe.py` does)."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal, get_args

from nf4_pipeline.errors import ResourceError, UsageError

DEFAULT_MEMORY_BUDGET: Final = 256 * 2**20
_DRIVER: Final = Path("/proc/driver/nvidia/gpus")
_MANY: Final = 1024

Engine = Literal["local", "ray"]
ENGINES: Final[tuple[Engine, ...]] = get_args(Engine)


@dataclass(frozen=True)
class Machine:
    """What the work may use.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N".
        require_gpu: verifying without a GPU is a failure.
        workers: threads that quantize; 0 for as many as keep the device busy.
        memory_budget: bytes for all buffers of the engine together.
        device_memory: bytes of the device that verifying may use; 0 for all that is free.
        engine: what runs the work: processes of this host, or tasks of a Ray cluster. Of these,
            each makes one file with as many `workers`, or one calibrates, or each compares both
            models on a share of the text.
        ray_address: of the cluster; None for the one that RAY_ADDRESS says, or else one that is
            started for this run.
    """

    device: str = "auto"
    require_gpu: bool = False
    workers: int = 0
    memory_budget: int = DEFAULT_MEMORY_BUDGET
    device_memory: int = 0
    engine: Engine = "local"
    ray_address: str | None = None


def may_have_cuda() -> bool:
    """False where there can be no CUDA device; known without importing torch."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def cuda_has_begun() -> bool:
    """Whether this process has started CUDA; known without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def kind_of_device(device: str) -> str:
    """ "cpu" or "cuda": what a choice stands for on this machine, known without importing torch.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
    """
    if device != "auto":
        return device.partition(":")[0]
    return "cuda" if _most_devices() > 0 else "cpu"


def check_device_name(device: str) -> None:
    """Refuses what can be the name of no device.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        UsageError: the device is none of these.
    """
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", device):
        return
    said = device.strip().casefold()
    number = re.fullmatch(r"(?:cuda|gpu)?[ :=]*([0-9]{1,4})", said)
    gpu = re.match(r"gpu|nvidia|cud|rtx|[ahlv][0-9]", said)
    meant = f"cuda:{number[1]}" if number else "cuda" if gpu else ""
    raise UsageError(
        f"--device {device[:80]!r}: expected auto, cpu, cuda, or cuda:0 for the first GPU."
        + (f" Did you mean {meant!r}?" if meant else "")
    )


def check_device(device: str) -> None:
    """Refuses a device that this machine cannot have, before anything is done for it.

    Without importing torch, which alone can tell whether the others work.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ResourceError: there is no such device.
    """
    kind, _, number = device.partition(":")
    if kind == "cuda" and int(number or 0) >= _most_devices():
        raise no_such_device(device, _most_devices())


def no_such_device(device: str, count: int) -> ResourceError:
    """The error of a device that is not there.

    Args:
        device: that was asked for.
        count: how many CUDA devices there are.
    """
    return ResourceError(
        f"Device {device} was asked for, but this machine has {count} CUDA devices that it can "
        "use. Take --device cpu, or look at nvidia-smi, CUDA_VISIBLE_DEVICES, and whether the "
        "installed torch was built for CUDA."
    )


def _most_devices() -> int:
    """How many CUDA devices there can be; many where nobody says."""
    if not may_have_cuda() or not _torch_knows_cuda():
        return 0
    count = len(list(_DRIVER.glob("*"))) or _MANY
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    named = visible.strip()
    return 0 if named in ("", "-1", "NoDevFiles") else min(count, len(named.split(",")))


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
