"""Builds that are calibrated, beside such that are rounded to nearest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from nf4_pipeline.build_folder import Build
from nf4_pipeline.job import StageResult, run_stage
from nf4_pipeline.machine import Machine
from nf4_pipeline.manifest.read import read_manifest
from nf4_pipeline.nf4.stored_weight import StoredWeight
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.recipe import QuantizeRecipe, Recipe

from tests.support.jobs import CPU, download
from tests.support.tiny import edit_json

FEW = 1024
"""Tokens that are enough for models so small."""


def downloaded(checkpoint: Path, folder: Path) -> Build:
    """A build of which only `download` is done."""
    with in_process():
        build, *_ = download(checkpoint, folder / "artifacts")
    return build


def shorten_context(checkpoint: Path) -> None:
    """A model then writes texts of 64 tokens and not of 256, side by side: it is done sooner."""
    config = checkpoint / "config.json"
    if json.loads(config.read_text())["model_type"] not in ("gpt2", "opt"):  # positions are learned
        edit_json(config, max_position_embeddings=64)


def settings(calibrate: str | Path = "self", tokens: int = FEW, **recipe: Any) -> Recipe:
    """Recipe of a calibrated build on the CPU; "" to round to nearest."""
    if calibrate:
        recipe |= {"calibrate": str(calibrate), "calibration_tokens": tokens}
    return Recipe(QuantizeRecipe(**recipe))


def quantized(
    build: Build, options: Recipe, reporter: Reporter = SILENT, *, machine: Machine = CPU
) -> StageResult:
    """Runs `quantize` and `serialize`; returns what came of the first."""
    result = run_stage(build, "quantize", options, machine, reporter, replaces=True)
    run_stage(build, "serialize", options, machine, reporter, replaces=True)
    return result


def manifest_of(build: Build) -> dict[str, Any]:
    return read_manifest(build.export).to_json()


def bytes_of(build: Build) -> dict[str, bytes]:
    """The content of every weight file in quantized/, and of what export/ says of it."""
    files = [
        *build.quantized.glob("*.safetensors"),
        *(build.export / name for name in ("manifest.json", "calibration.json")),
    ]
    return {path.name: path.read_bytes() for path in files if path.exists()}


def read_back(tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> Any:
    """A weight of an artifact as every reader computes it, float32."""
    arrays = {key: tensors[key].numpy() for key in parts(tensors, name)}
    weight = StoredWeight.read(name, arrays).dequantize()
    assert weight.shape == shape
    return weight


def parts(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The six tensors of a quantized weight."""
    return {key: value for key, value in tensors.items() if f"{key}.".startswith(f"{name}.")}


class Listener(type(SILENT)):  # type: ignore[misc]
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
