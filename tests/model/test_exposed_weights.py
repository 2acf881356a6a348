"""Layers whose weight a model takes for itself are found by running it without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nf4_pipeline.model.exposed_weights import exposed_modules
from nf4_pipeline.model.meta_model import build_meta_model
from torch import nn
from transformers import BloomConfig, MambaConfig, RwkvConfig

from tests.support.transformers_versions import MULTIPLIES_BY_WEIGHT

SMALL = {"vocab_size": 64, "hidden_size": 32}


def exposed(model: Any) -> set[str]:
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return set(exposed_modules(model, frozenset(linears)))


def test_slices_of_a_weight_depend_on_the_config() -> None:
    sizes = {**SMALL, "n_layer": 1, "n_head": 4}
    assert exposed(build_meta_model(BloomConfig(**sizes))) == set()
    sliced = BloomConfig(**sizes, pretraining_tp=2, slow_but_exact=True)
    assert exposed(build_meta_model(sliced)) == {
        "transformer.h.0.mlp.dense_4h_to_h",
        "transformer.h.0.self_attention.dense",
    }


@pytest.mark.skipif(not MULTIPLIES_BY_WEIGHT, reason="Mamba of an older transformers does not")
def test_products_with_a_weight() -> None:
    config = MambaConfig(**SMALL, num_hidden_layers=1, state_size=4)
    assert exposed(build_meta_model(config)) >= {"backbone.layers.0.mixer.dt_proj"}


def test_code_that_knows_of_quantized_weights_may_take_them() -> None:
    config = RwkvConfig(**SMALL, num_hidden_layers=2, attention_hidden_size=32)
    assert exposed(build_meta_model(config)) == set()


class Choosing(nn.Module):
    """Depends on values, so it cannot run on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.plain = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.plain(hidden).sum() > 0:
            hidden = nn.functional.linear(hidden, self.gate.weight)
        return hidden


class Whole(nn.Module):
    """Passes its tokens through one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.inner = Choosing()
        self.asked = nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        hidden: torch.Tensor = self.inner(self.embed(input_ids))
        out: torch.Tensor = self.asked(hidden.to(self.asked.weight.device)) + hidden
        return out


def test_what_cannot_run_is_read() -> None:
    with torch.device("meta"):
        model = Whole()
    assert exposed(model) == {"inner.gate"}
