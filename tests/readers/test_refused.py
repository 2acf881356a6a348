"""What no reader could load is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from nf4_pipeline.errors import ArchitectureError
from nf4_pipeline.model.meta_model import read_architecture

CONFIG = {
    "model_type": "llama4_text",
    "architectures": ["Llama4ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
    "pad_token_id": 0,
}


def test_modules_that_transformers_replaces() -> None:
    with pytest.raises(ArchitectureError, match="is a Llama4TextExperts, for which transformers"):
        read_architecture(CONFIG, [], Path("llama4"))
