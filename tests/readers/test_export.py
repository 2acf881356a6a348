"""Exports that stock transformers loads and runs, made of checkpoints that our loader alone ran."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from nf4_pipeline.checkpoint.safetensors_header import HeaderTensor
from nf4_pipeline.checkpoint.source import SourceTensor
from nf4_pipeline.engine.shard_job import _cast
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.selection import TensorPlan
from safetensors.torch import load_file, save_file

from tests.support.tiny import nf4, write_tokenizer

CONFIG = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tied model saved under the head's name, its norms in float32; and its export."""
    folder = tmp_path_factory.mktemp("odd")
    source = folder / "source"
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).to(torch.bfloat16)
    model.save_pretrained(source)
    write_tokenizer(source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    tensors |= {n: 1.001 * t.float() for n, t in tensors.items() if "norm" in n}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    build = folder / "build"
    steps: list[list[str | Path]] = [
        ["download", source, "--build-dir", build],
        ["quantize", "--build-dir", build, "--device", "cpu"],
        ["serialize", "--build-dir", build],
    ]
    for arguments in steps:
        done = nf4(*arguments, cwd=folder)
        assert done.status == 0, done.err
    return source, build / "export"


def test_what_is_stored(folders: tuple[Path, Path]) -> None:
    export = folders[1]
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    assert torch.equal(after["model.embed_tokens.weight"], before["lm_head.weight"])
    assert "lm_head.weight" not in after
    norm = "model.norm.weight"
    assert torch.equal(after[norm], before[norm].to(torch.bfloat16))
    tensors = {t["name"]: t for t in json.loads((export / "manifest.json").read_text())["tensors"]}
    assert tensors[norm]["reason"] == "normalization; F32 cast to the model's BF16"
    assert (tensors[norm]["dtype"], tensors[norm]["stored"][0]["dtype"]) == ("F32", "BF16")
    assert tensors["model.embed_tokens.weight"]["source_name"] == "lm_head.weight"


def test_stock_transformers_runs_it(folders: tuple[Path, Path]) -> None:
    source, export = folders
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, said = load(export, device_map={"": "cpu"}, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        found = model(ids).logits.float()
        expected = load(source, dtype=torch.bfloat16)(ids).logits.float()
    assert torch.linalg.norm(found - expected) < 0.25 * torch.linalg.norm(expected)


def test_what_does_not_fit_is_refused() -> None:
    header = HeaderTensor("norm.weight", "F32", (2,), 0, 8)
    plan = TensorPlan(SourceTensor("f", header), "norm.weight", "keep", "", cast_to="F16")
    bits = np.array([1.0, 1e6], np.float32).view(np.uint32)
    with pytest.raises(CheckpointError, match=r"'norm\.weight' in f is F32 .* large for float16"):
        _cast(bits, plan)
