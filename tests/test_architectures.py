"""Decoders beyond those that are compared with stock: they build, load and compute."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import nf4_pipeline
import pytest
import torch
from nf4_pipeline.job import run_stage
from nf4_pipeline.manifest.read import read_manifest
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe

from tests.support.decoders import DECODERS, write_decoder
from tests.support.jobs import CPU, download
from tests.support.stock import linear4bit, logits
from tests.support.transformers_versions import MULTIPLIES_BY_WEIGHT

pytestmark = pytest.mark.usefixtures("workers_here")

TOKENS: Final = (torch.arange(24) * 9 % 250).reshape(2, 12)
MERGED: Final = {"mixtral": 2 * 4 * 3, "qwen2_moe": 2 * 4 * 3}  # layers x experts x projections
EXPOSED: Final = {"mamba": 2 * MULTIPLIES_BY_WEIGHT}


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_built_loaded_and_computes(name: str, tmp_path: Path) -> None:
    model = write_decoder(tmp_path / name, name)
    build, *_ = download(tmp_path / name, tmp_path / "artifacts")
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, Recipe(), CPU, SILENT)

    manifest = read_manifest(build.export).to_json()
    planned = {tensor["module"] for tensor in manifest["tensors"] if tensor["quantized"]}
    reasons = [tensor["reason"] for tensor in manifest["tensors"]]
    assert planned
    assert sum("merged" in reason for reason in reasons) == MERGED.get(name, 0)
    assert sum("directly" in reason for reason in reasons) == EXPOSED.get(name, 0)
    loaded = nf4_pipeline.load(build.export, device="cpu")
    assert linear4bit(loaded) == planned
    found, exact = logits(loaded, TOKENS), logits(model, TOKENS)
    # NF4 moves the logits of these random models by 0.08 to 0.23; unrelated ones by about 1.4.
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.4


def test_the_user_is_told_what_share_stays_in_16_bit(tmp_path: Path) -> None:
    write_decoder(tmp_path / "model", "mixtral")
    build, *_ = download(tmp_path / "model", tmp_path / "artifacts")
    notes: list[str] = []

    class Listener(type(SILENT)):  # type: ignore[misc]
        def note(self, text: str) -> None:
            notes.append(text)

    run_stage(build, "quantize", Recipe(), CPU, Listener())
    assert any("77% of this model" in note and "16 bit" in note for note in notes)
