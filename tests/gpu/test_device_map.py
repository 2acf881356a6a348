"""On two CUDA devices: one model over both, with the logits of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nf4_pipeline
import pytest
from nf4_pipeline.errors import ResourceError

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]


@pytest.fixture(scope="module")
def one(exported_falcon: Path) -> Any:
    return logits(nf4_pipeline.load(exported_falcon / "export", device="cuda:0"))


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(torch.arange(12, device=model.device).reshape(2, 6) * 7 + 5).logits.cpu()


@pytest.mark.parametrize("source", ["export", "checkpoint"])
@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        "balanced",
        {
            "transformer.word_embeddings": 0,
            "transformer.h.0": 0,
            "transformer.rotary_emb": 0,
            "transformer.h.1": "cuda:1",
            "transformer.ln_f": torch.device("cuda:1"),
            "lm_head": 0,
        },
    ],
    ids=["auto", "balanced", "by name"],
)
def test_a_model_lies_on_both(
    device_map: Any, source: str, exported_falcon: Path, tiny_falcon: Path, one: Any
) -> None:
    folder = exported_falcon / "export" if source == "export" else tiny_falcon
    model = nf4_pipeline.load(folder, device_map=device_map)
    assert {str(p.device) for p in model.parameters()} == {"cuda:0", "cuda:1"}
    assert model.is_loaded_in_4bit
    torch.testing.assert_close(logits(model).float(), one.float(), rtol=0, atol=0.02)
    ids = torch.tensor([[5, 6, 7]], device=model.device)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 7)


def test_in_a_pipeline_of_transformers(exported_falcon: Path) -> None:
    from transformers import pipeline

    export = exported_falcon / "export"
    model = nf4_pipeline.load(export, device_map="auto")
    write = pipeline("text-generation", model=model, tokenizer=nf4_pipeline.load_tokenizer(export))
    assert write("Hello", max_new_tokens=4)[0]["generated_text"].startswith("Hello")


def test_what_fits_on_no_gpu_is_said(exported_falcon: Path) -> None:
    memory: dict[int | str, int | str] = {0: "1KB", 1: "1KB", "cpu": "1GB"}
    with pytest.raises(ResourceError, match="does not fit the memory of cuda:0, cuda:1"):
        nf4_pipeline.load(exported_falcon / "export", device_map="auto", max_memory=memory)
