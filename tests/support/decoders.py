"""Decoders beyond those that are compared with stock: tiny, random, in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
import transformers

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

DECODERS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
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
    # It divides weights in place when it first runs, and hidden states after every third layer.
    "rwkv": (
        "Rwkv",
        {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 4, "rescale_every": 3},
    ),
}
"""Name -> prefix of its classes in transformers, and what of its config is not the default."""


def write_decoder(folder: Path, name: str, **changed: Any) -> Any:
    """Writes a random checkpoint of one of `DECODERS`, and returns the model in eval mode.

    Args:
        folder: where.
        name: one of `DECODERS`.
        changed: of its config.
    """
    prefix, values = DECODERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**values | changed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model.eval()
