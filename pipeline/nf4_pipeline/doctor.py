"""What this machine has for the job, and which known traps lie on it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, Literal

from nf4_pipeline import __version__
from nf4_pipeline.documents import Document
from nf4_pipeline.resource_usage import available_memory, free_space

_LIBRARIES: Final = (
    "torch",
    "transformers",
    "bitsandbytes",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "numba",
)
_TOKENIZERS: Final = ("sentencepiece", "tiktoken", "mistral-common")
_FALCON_BYTES: Final = 19e9  # falcon-7b-instruct and its artifact
_AMPERE: Final = 8  # the first compute capability with bfloat16 arithmetic


@dataclass(frozen=True)
class Finding(Document):
    """One thing worth knowing: "ok", "note" (it is taken care of) or "problem" (do something)."""

    kind: Literal["ok", "note", "problem"]
    text: str


@dataclass(frozen=True)
class Gpu(Document):
    """A CUDA device; `capability` is its compute capability, major and minor."""

    name: str
    memory_bytes: int
    capability: tuple[int, ...]


@dataclass(frozen=True)
class Disk(Document):
    """Free space where a folder is, or will be."""

    folder: str
    free_bytes: int


@dataclass(frozen=True)
class HubAccess(Document):
    """How the Hub would be reached; `token` says whether there is one."""

    endpoint: str
    offline: bool
    token: bool


@dataclass(frozen=True, kw_only=True)
class MachineReport(Document):
    """What there is, as `nf4 doctor --json` says it. No token and no user name is in it.

    Attributes:
        nf4_pipeline: version of this package.
        python: version.
        system: kernel and processor architecture.
        processors: that this process may use.
        available_memory_bytes: that can be used without swapping; None if the system does not say.
        libraries: name -> version, None if it is not installed.
        tokenizers: the same of packages that only some tokenizers need.
        gpus: CUDA devices that torch can use.
        disks: free space for builds and for the Hub cache.
        hub: how the Hub would be reached.
        findings: what is worth knowing of all that.
    """

    nf4_pipeline: str
    python: str
    system: str
    processors: int
    available_memory_bytes: int | None
    libraries: Mapping[str, str | None]
    tokenizers: Mapping[str, str | None]
    gpus: tuple[Gpu, ...]
    disks: Mapping[str, Disk]
    hub: HubAccess
    findings: tuple[Finding, ...] = ()


def examine(artifacts: Path) -> MachineReport:
    """Looks at processor, memory, GPUs, libraries, disks and Hub settings.

    Args:
        artifacts: the folder where builds would go.
    """
    machine = MachineReport(
        nf4_pipeline=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        processors=len(os.sched_getaffinity(0)),
        available_memory_bytes=available_memory(),
        libraries={name: _version(name) for name in _LIBRARIES},
        tokenizers={name: _version(name) for name in _TOKENIZERS},
        gpus=tuple(_gpus()),
        disks={"builds": _disk(artifacts), "hub_cache": _disk(_hub_cache())},
        hub=HubAccess(
            endpoint=os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
            offline=os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "TRUE", "yes", "on"),
            token=bool(os.environ.get("HF_TOKEN")) or (_hub_home() / "token").is_file(),
        ),
    )
    return replace(machine, findings=(*_broken(), *find_traps(machine)))


def find_traps(machine: MachineReport) -> Iterator[Finding]:
    """What is worth knowing of a machine."""
    missing = [name for name, value in machine.libraries.items() if value is None]
    if missing:
        text = f"not installed: {', '.join(missing)}. Install this package again."
        yield Finding(kind="problem", text=text)
    lacking = [name for name, value in machine.tokenizers.items() if value is None]
    if lacking:
        yield Finding(
            kind="note",
            text=f"not installed: {', '.join(lacking)}, which only tokenizers without a "
            "tokenizer.json need; pip install 'nf4-pipeline[tokenizers]' brings them",
        )
    yield from _gpu_findings(machine.gpus)
    transformers = machine.libraries["transformers"]
    if transformers and _numbers(transformers) >= (5, 5):
        yield Finding(
            kind="note",
            text=f"transformers {transformers} passes over linear layers whose class is a subclass "
            "of nn.Linear, such as Falcon's; here they are quantized, and nf4_pipeline.load "
            "loads them",
        )
    if machine.libraries["bitsandbytes"]:
        yield Finding(
            kind="note",
            text="bitsandbytes 0.50 computes 4-bit layers of some shapes wrongly on a CPU "
            "(in_features a multiple of 16 but not of 64); nf4_pipeline.load puts them right",
        )
    for name, disk in machine.disks.items():
        if disk.free_bytes < _FALCON_BYTES:
            yield Finding(
                kind="note",
                text=f"{disk.folder} ({name.replace('_', ' ')}) has "
                f"{disk.free_bytes / 1e9:.1f} GB free; tiiuae/falcon-7b-instruct and its "
                f"artifact take {_FALCON_BYTES / 1e9:.0f} GB",
            )
    if machine.hub.offline:
        yield Finding(kind="note", text="HF_HUB_OFFLINE is set: only cached models can be used")


def _gpu_findings(gpus: tuple[Gpu, ...]) -> Iterator[Finding]:
    if not gpus:
        there = Path("/dev/nvidiactl").exists()
        text = (
            "this machine has an NVIDIA driver, but this torch cannot use it: it may be a CPU "
            "build. Install a CUDA build of torch."
            if there
            else "no GPU: everything runs on the CPU; verifying a model of 7 billion weights there "
            "takes an hour or more (--eval-tokens shortens it)"
        )
        yield Finding(kind="problem" if there else "note", text=text)
    for gpu in gpus:
        if gpu.capability[0] < _AMPERE:
            yield Finding(
                kind="note",
                text=f"{gpu.name} has no bfloat16 arithmetic; models are run in float16 there",
            )


def _broken() -> Iterator[Finding]:
    """Whether torch is there and does not start, as without a library of the system's."""
    if _version("torch") is None:
        return
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        yield Finding(
            kind="problem",
            text=f"torch cannot be imported: {error}. Install this package again.",
        )


def _gpus() -> Iterator[Gpu]:
    if _version("torch") is None:
        return
    try:
        import torch
    except (ImportError, OSError):  # said by `_broken`
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(count):
        device = torch.cuda.get_device_properties(number)
        yield Gpu(device.name, device.total_memory, (device.major, device.minor))


def _disk(folder: Path) -> Disk:
    return Disk(str(folder), free_space(folder))


def _hub_home() -> Path:
    return _in_home(os.environ.get("HF_HOME", "~/.cache/huggingface"))


def _hub_cache() -> Path:
    return _in_home(os.environ.get("HF_HUB_CACHE", _hub_home() / "hub"))


def _in_home(path: str | Path) -> Path:
    """A path that may begin with "~", which stays where a user has no home, as in the client."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)
