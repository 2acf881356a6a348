"""Builds that are calibrated, beside such that are rounded to nearest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nf4_pipeline.build_folder import Build
from nf4_pipeline.job import StageResult, run_stage
from nf4_pipeline.manifest.read import read_manifest
from nf4_pipeline.nf4.dequantize import dequantize
from nf4_pipeline.nf4.double_quant import NestedScales
from nf4_pipeline.nf4.layout import QUANT_STATE_SUFFIX
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.recipe import QuantizeRecipe, Recipe
from nf4_pipeline.stages import Settings, download, preflight

from tests.support.architecture import FactsHere

FEW = 1024
"""Tokens that are enough for models so small."""


def downloaded(checkpoint: Path, folder: Path) -> Build:
    """A build of which only `download` is done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "PendingFacts", FactsHere)
        build, *_ = download.run(str(checkpoint), folder / "artifacts", SILENT)
    return build


def settings(calibrate: str | Path = "self", tokens: int = FEW, **recipe: Any) -> Settings:
    """Settings of a calibrated build on the CPU; "" to round to nearest."""
    if calibrate:
        recipe |= {"calibrate": str(calibrate), "calibration_tokens": tokens}
    return Settings(recipe=Recipe(QuantizeRecipe(**recipe)), device="cpu")


def quantized(build: Build, options: Settings, reporter: Reporter = SILENT) -> StageResult:
    """Runs `quantize` and `serialize`; returns what came of the first."""
    result = run_stage(build, "quantize", options, reporter)
    run_stage(build, "serialize", options, reporter)
    return result


def manifest_of(build: Build) -> dict[str, Any]:
    found: dict[str, Any] = read_manifest(build.export)
    return found


def bytes_of(build: Build) -> dict[str, bytes]:
    """The content of every weight file in quantized/, and of what export/ says of it."""
    files = [
        *build.quantized.glob("*.safetensors"),
        *(build.export / name for name in ("manifest.json", "calibration.json")),
    ]
    return {path.name: path.read_bytes() for path in files if path.exists()}


def read_back(tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> Any:
    """A weight of an artifact as every reader computes it, float32."""
    state = json.loads(bytes(tensors[name + QUANT_STATE_SUFFIX].tolist()))
    nested = NestedScales(
        tensors[f"{name}.absmax"].numpy(),
        tensors[f"{name}.nested_absmax"].numpy(),
        np.float32(state["nested_offset"]),
    )
    return dequantize(tensors[name].numpy().reshape(-1), nested.scales(), shape)


def parts(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The six tensors of a quantized weight."""
    return {key: value for key, value in tensors.items() if key.startswith(name)}


class Listener(type(SILENT)):  # type: ignore[misc]
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
