"""On a CUDA device: the same seed gives the same text, however long, whatever the architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from nf4_pipeline.calibration.drawing import Batch, draw
from nf4_pipeline.runtime.determinism import deterministic_on_gpu

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE: Final = "cuda:0"
LENGTH: Final = 320
"""Tokens; what sees more than 128 others is where kernels of an H200 differ each time."""


def model_of(architecture: str) -> Any:
    """One layer as wide as a real one, with random weights in bfloat16."""
    from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig

    config: Any = (
        FalconConfig(hidden_size=71 * 64, num_attention_heads=71, num_hidden_layers=1,
                     vocab_size=512, bias=False)
        if architecture == "falcon"
        else LlamaConfig(hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                         num_key_value_heads=3, num_hidden_layers=2, vocab_size=512)
    )  # fmt: skip
    torch.manual_seed(3)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


@pytest.mark.parametrize("rows", [32, 512])
@pytest.mark.parametrize("architecture", ["falcon", "llama"])
def test_the_same_seed_draws_the_same_texts(architecture: str, rows: int) -> None:
    from nf4_pipeline.model.fast_attention import use_fast_attention

    model = model_of(architecture)
    use_fast_attention(model)
    batch = Batch(np.full((rows, 1), 7, np.int64), seed=5)
    with torch.inference_mode():
        first, *others = (draw(model, DEVICE, batch, LENGTH, "") for _ in range(3))
    assert len(np.unique(first[:, 1:])) > 100
    for other in others:
        assert (first != other).sum() == 0


@pytest.mark.parametrize("seen", [129, 200, 400])
@pytest.mark.parametrize(("heads", "shared"), [(71, 1), (9, 3), (32, 32)])
def test_attention_to_what_is_cached_is_the_same_each_time(
    heads: int, shared: int, seen: int
) -> None:
    dice = torch.Generator(DEVICE).manual_seed(seen)

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=dice, device=DEVICE, dtype=torch.bfloat16)

    query = random(256, heads, 1, 64)
    keys, values = random(256, shared, seen, 64), random(256, shared, seen, 64)
    with torch.inference_mode(), deterministic_on_gpu(DEVICE):
        first, *others = (
            torch.nn.functional.scaled_dot_product_attention(
                query, keys, values, enable_gqa=heads != shared
            )
            for _ in range(8)
        )
    assert all(torch.equal(first, other) for other in others)


def test_answers_with_a_seed_are_the_same_each_time(tmp_path: Path) -> None:
    from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
    from nf4_pipeline.runtime.generate import Generator, Sampling

    from tests.support.tiny import write_falcon

    folder = write_falcon(tmp_path / "model")
    generator = Generator(model_of("llama"), LimitedTokenizer.open(folder))
    sampling = Sampling(max_new_tokens=LENGTH, top_k=400, num_return_sequences=64, seed=9)
    first, second = (
        [answer.ids for answer in generator.answer("a few words", sampling)] for _ in range(2)
    )
    assert len(first) == 64
    assert max(map(len, first)) > 200
    assert first == second
