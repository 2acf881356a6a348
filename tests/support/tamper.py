"""Ways to forge an artifact, and to make a forged one agree with itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.digest import digest_file, digest_tensors
from nf4_pipeline.checkpoint.safetensors_header import read_header
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import INDEX_FILE, read_tensors, weight_files

Forgery = Callable[[Build], None]

PARTS: Final = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
)
"""What a 4-bit weight has beside its codes."""


def change(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Puts other tensors in the place of some; None takes one away. The index follows."""
    left = dict(changes)
    for path in weight_files(folder):
        tensors = load_file(path)
        for name in left.keys() & tensors.keys():
            new = left.pop(name)
            del tensors[name]
            if new is not None:
                tensors[name] = new.contiguous()
        path.unlink()  # it may be a link to what quantize wrote
        save_file(tensors, path, metadata={"format": "pt"})
    assert not left, f"no such tensors: {sorted(left)}"
    if (folder / INDEX_FILE).is_file():
        files = {
            tensor.name: path.name for path in weight_files(folder) for tensor in read_header(path)
        }
        index = json.loads((folder / INDEX_FILE).read_text("utf-8"))
        (folder / INDEX_FILE).write_text(json.dumps({**index, "weight_map": files}), "utf-8")


def shuffle_codes(weight: str) -> Forgery:
    """The codes of one layer in another order."""

    def forge(build: Build) -> None:
        codes = read_tensors(build.export)[weight]
        order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))
        change(build.export, {weight: codes[order]})

    return forge


def zero_scale(weight: str, block: int) -> Forgery:
    """A scale of 64 weights that is as near to 0 as its byte can make it."""

    def forge(build: Build) -> None:
        tensors = read_tensors(build.export)
        parts = {part: tensors[weight + part] for part in PARTS}
        offset = json.loads(bytes(parts[".quant_state.bitsandbytes__nf4"].tolist()))[
            "nested_offset"
        ]
        absmax = parts[".absmax"].clone()
        scales = parts[".nested_quant_map"] * parts[".nested_absmax"][block // 256] + offset
        absmax[block] = int(scales.abs().argmin())
        change(build.export, {weight + ".absmax": absmax})

    return forge


def zero_scale_byte(weight: str, block: int) -> Forgery:
    """The byte of a scale of 64 weights set to 0."""

    def forge(build: Build) -> None:
        absmax = read_tensors(build.export)[weight + ".absmax"].clone()
        absmax[block] = 0
        change(build.export, {weight + ".absmax": absmax})

    return forge


def swap(weight: str, other: str) -> Forgery:
    """Another layer's codes and scales in the place of one's own."""

    def forge(build: Build) -> None:
        tensors = read_tensors(build.export)
        change(build.export, {weight + part: tensors[other + part] for part in ("", *PARTS)})

    return forge


def leave_in_16_bit(weight: str) -> Forgery:
    """The source's weight in the place of the codes; the config still says 4 bit."""

    def forge(build: Build) -> None:
        source = read_tensors(build.source)[weight]
        change(build.export, {weight: source, **{weight + part: None for part in PARTS}})

    return forge


def agree(build: Build) -> None:
    """Makes manifest and records say what the files hold, as a clever forger would."""
    path = build.export / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["files"] = {
        name: digest_file(build.export / name).to_json() for name in manifest["files"]
    }
    stored = {}
    for file in weight_files(build.export):
        headers = read_header(file)
        hashes = digest_tensors(file, headers)[1]
        for tensor in headers:
            stored[tensor.name] = {
                "name": tensor.name,
                "file": file.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "bytes": tensor.nbytes,
                "sha256": hashes[tensor.name],
            }
    for entry in manifest["tensors"]:
        entry["stored"] = [stored[p["name"]] for p in entry["stored"] if p["name"] in stored]
        entry["bytes"] = sum(part["bytes"] for part in entry["stored"])
        entry["quantized"] &= len(entry["stored"]) == 1 + len(PARTS)  # else it is no valid manifest
    manifest["tensors"] = [entry for entry in manifest["tensors"] if entry["stored"]]
    path.write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    record = build.root / "records" / "serialize.json"
    value: dict[str, Any] = json.loads(record.read_text("utf-8"))
    for name in value["outputs"]:
        file = build.root / name
        value["outputs"][name] = {
            **digest_file(file).to_json(),
            "mtime_ns": file.stat().st_mtime_ns,
        }
    record.write_text(json.dumps(value), "utf-8")
