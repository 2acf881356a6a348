"""What this machine has for the job, and which known traps lie on it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal, TypedDict

from nf4_pipeline import __version__
from nf4_pipeline.resource_usage import available_memory

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


class Finding(TypedDict):
    """One thing worth knowing: "ok", "note" (it is taken care of) or "problem" (do something)."""

    kind: Literal["ok", "note", "problem"]
    text: str


def examine(artifacts: Path) -> dict[str, Any]:
    """Looks at processor, memory, GPUs, libraries, disks and Hub settings.

    Args:
        artifacts: the folder where builds would go.

    Returns:
        Plain JSON: what there is, and "findings". No token and no user name is in it.
    """
    found: dict[str, Any] = {
        "nf4_pipeline": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": len(os.sched_getaffinity(0)),
        "available_memory_bytes": available_memory(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "tokenizers": {name: _version(name) for name in _TOKENIZERS},
        "gpus": _gpus(),
        "disks": {
            "builds": _disk(artifacts),
            "hub_cache": _disk(_hub_cache()),
        },
        "hub": {
            "endpoint": os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
            "offline": os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "TRUE", "yes", "on"),
            "token": bool(os.environ.get("HF_TOKEN")) or (_hub_home() / "token").is_file(),
        },
    }
    found["findings"] = list(_findings(found))
    return found


def _findings(found: dict[str, Any]) -> Iterator[Finding]:
    missing = [name for name, value in found["libraries"].items() if value is None]
    if missing:
        text = f"not installed: {', '.join(missing)}. Install this package again."
        yield Finding(kind="problem", text=text)
    lacking = [name for name, value in found["tokenizers"].items() if value is None]
    if lacking:
        yield Finding(
            kind="note",
            text=f"not installed: {', '.join(lacking)}, which only tokenizers without a "
            "tokenizer.json need; pip install 'nf4-pipeline[tokenizers]' brings them",
        )
    yield from _gpu_findings(found["gpus"])
    transformers = found["libraries"]["transformers"]
    if transformers and _numbers(transformers) >= (5, 5):
        yield Finding(
            kind="note",
            text=f"transformers {transformers} passes over linear layers whose class is a subclass "
            "of nn.Linear, such as Falcon's; here they are quantized, and nf4_pipeline.load "
            "loads them",
        )
    if found["libraries"]["bitsandbytes"]:
        yield Finding(
            kind="note",
            text="bitsandbytes 0.50 computes 4-bit layers of some shapes wrongly on a CPU "
            "(in_features a multiple of 16 but not of 64); nf4_pipeline.load puts them right",
        )
    for name, disk in found["disks"].items():
        if disk["free_bytes"] < _FALCON_BYTES:
            yield Finding(
                kind="note",
                text=f"{disk['folder']} ({name.replace('_', ' ')}) has "
                f"{disk['free_bytes'] / 1e9:.1f} GB free; tiiuae/falcon-7b-instruct and its "
                f"artifact take {_FALCON_BYTES / 1e9:.0f} GB",
            )
    if found["hub"]["offline"]:
        yield Finding(kind="note", text="HF_HUB_OFFLINE is set: only cached models can be used")


def _gpu_findings(gpus: list[dict[str, Any]]) -> Iterator[Finding]:
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
        if gpu["capability"][0] < _AMPERE:
            yield Finding(
                kind="note",
                text=f"{gpu['name']} has no bfloat16 arithmetic; models are run in float16 there",
            )


def _gpus() -> list[dict[str, Any]]:
    if _version("torch") is None:
        return []
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = []
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        found.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": [properties.major, properties.minor],
            }
        )
    return found


def _disk(folder: Path) -> dict[str, Any]:
    """Free space where a folder is, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return {"folder": str(folder), "free_bytes": shutil.disk_usage(there).free}


def _hub_home() -> Path:
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()


def _hub_cache() -> Path:
    return Path(os.environ.get("HF_HUB_CACHE", _hub_home() / "hub")).expanduser()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)
