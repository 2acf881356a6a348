"""Decoders beyond those that are compared with stock: they build, load and compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers

import pipeline
from pipeline.job import run_stage
from pipeline.manifest.read import read_manifest
from pipeline.progress import SILENT
from pipeline.stages import Settings, download
from tests.support.facts import FactsHere
from tests.support.stock import linear4bit, logits

TOKENS: Final = (torch.arange(24) * 9 % 250).reshape(2, 12)
SIZES: Final = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT: Final = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
MAMBA: Final = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2}

CASES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "mixtral": ("Mixtral", SIZES | {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2Moe",
        SIZES
        | {
            "num_experts": 4,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "phi3": ("Phi3", SIZES | {"pad_token_id": 0}),
    "olmo2": ("Olmo2", SIZES | {"pad_token_id": 0}),
    "stablelm": ("StableLm", SIZES),
    "gptj": ("GPTJ", GPT),
    "codegen": ("CodeGen", GPT),
    "mpt": ("Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 256}),
    "mamba": ("Mamba", MAMBA),
}
MERGED: Final = {"mixtral": 2 * 4 * 3, "qwen2_moe": 2 * 4 * 3}  # layers x experts x projections
EXPOSED: Final = {"mamba": 2}


@pytest.mark.parametrize("name", CASES)
def test_a_decoder_is_built_loaded_and_computes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, values = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**values)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / name)
    monkeypatch.setattr(download, "PendingFacts", FactsHere)
    build, *_ = download.run(str(tmp_path / name), tmp_path / "artifacts", SILENT)
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, Settings(device="cpu"), SILENT)

    manifest = read_manifest(build.export)
    planned = {tensor["module"] for tensor in manifest["tensors"] if tensor["quantized"]}
    reasons = [tensor["reason"] for tensor in manifest["tensors"]]
    assert planned
    assert sum("merged" in reason for reason in reasons) == MERGED.get(name, 0)
    assert sum("directly" in reason for reason in reasons) == EXPOSED.get(name, 0)
    loaded = pipeline.load(build.export, device="cpu")
    assert linear4bit(loaded) == planned
    found, exact = logits(loaded, TOKENS), logits(model.eval(), TOKENS)
    # NF4 moves the logits of these random models by 0.08 to 0.23; unrelated ones by about 1.4.
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.4


def test_the_user_is_told_what_share_stays_in_16_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, values = CASES["mixtral"]
    config = getattr(transformers, f"{prefix}Config")(**values)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(download, "PendingFacts", FactsHere)
    build, *_ = download.run(str(tmp_path / "model"), tmp_path / "artifacts", SILENT)
    notes: list[str] = []

    class Listener(type(SILENT)):  # type: ignore[misc]
        def note(self, text: str) -> None:
            notes.append(text)

    run_stage(build, "quantize", Settings(device="cpu"), Listener())
    assert any("77% of this model" in note and "16 bit" in note for note in notes)
