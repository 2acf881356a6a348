"""Tiny random checkpoints, made on the fly: every architecture as published ones look on disk.

Sizes are small and, where the architecture allows, awkward: weights whose count is odd, or no
multiple of a block of 64, and scales that fill no whole number of nested blocks of 256.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

END: Final = "<|endoftext|>"
VOCABULARY: Final = 257  # the bytes and END; odd, so the embedding is ragged, too

INDEX_FILE: Final = "model.safetensors.index.json"
HEAD: Final = "lm_head.weight"

_COMMON: Final = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 256}
_ROPE_SMALL: Final = {"max_position_embeddings": 128}

KINDS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    # 144 x 144 weights are 324 blocks; 176 x 144 (the fused projection) are 396.
    "falcon-7b": (
        "falcon",
        {
            "hidden_size": 144,
            "num_attention_heads": 9,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
            "alibi": False,
            "new_decoder_architecture": False,
        },
    ),
    # Every weight is whole blocks, and outputs are multiples of 32, as in models of real size.
    "falcon-whole": (
        "falcon",
        {
            "hidden_size": 128,
            "num_attention_heads": 4,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
            "alibi": False,
            "new_decoder_architecture": False,
        },
    ),
    # head size 10; 80 x 40 and 160 x 40 weights.
    "falcon-40b": (
        "falcon",
        {
            "hidden_size": 40,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "parallel_attn": True,
            "bias": False,
            "alibi": False,
            "new_decoder_architecture": True,
        },
    ),
    # 30 x 30 weights are 14 blocks and 4 weights; no power of two for the heads, which alibi minds.
    "falcon-rw": (
        "falcon",
        {
            "hidden_size": 30,
            "num_attention_heads": 3,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
            "alibi": True,
            "new_decoder_architecture": False,
        },
    ),
    # 172 x 136 weights are 365 blocks and a half.
    "llama": (
        "llama",
        {
            "hidden_size": 136,
            "intermediate_size": 172,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
            **_ROPE_SMALL,
        },
    ),
    # Biases on q, k and v; a key projection of 18 x 36 weights: 10 blocks and 8 weights.
    "qwen2": (
        "qwen2",
        {
            "hidden_size": 36,
            "intermediate_size": 52,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            **_ROPE_SMALL,
        },
    ),
    # Conv1D: the source stores [in, out]. 45 x 45 weights are an odd number, so the last byte of
    # the codes is half used.
    "gpt2": ("gpt2", {"n_embd": 45, "n_head": 5, "n_layer": 2, "n_positions": 128}),
    "gpt_neox": (
        "gpt_neox",
        {
            "hidden_size": 36,
            "intermediate_size": 100,
            "num_attention_heads": 2,
            "tie_word_embeddings": False,
            **_ROPE_SMALL,
        },
    ),
    # The embedding is narrower than the model, so there are project_in and project_out.
    "opt": (
        "opt",
        {
            "hidden_size": 44,
            "ffn_dim": 60,
            "word_embed_proj_dim": 24,
            "num_attention_heads": 2,
            "pad_token_id": 1,
            "do_layer_norm_before": False,
            **_ROPE_SMALL,
        },
    ),
    "phi": (
        "phi",
        {
            "hidden_size": 40,
            "intermediate_size": 70,
            "num_attention_heads": 2,
            "tie_word_embeddings": False,
            **_ROPE_SMALL,
        },
    ),
    "gemma2": (
        "gemma2",
        {
            "hidden_size": 36,
            "intermediate_size": 52,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 14,
            "pad_token_id": 0,
            **_ROPE_SMALL,
        },
    ),
    "bloom": ("bloom", {"hidden_size": 35, "n_head": 5, "n_layer": 2}),
}
"""Kind -> model type and what of its config is not the default."""

FALCONS: Final = tuple(kind for kind in KINDS if kind.startswith("falcon"))


def make_checkpoint(
    folder: Path,
    kind: str,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    max_shard_size: str = "5GB",
    stored_head: bool = False,
    bare_names: bool = False,
) -> Path:
    """Writes a random checkpoint with its tokenizer.

    Args:
        folder: where; made if missing.
        kind: one of `KINDS`.
        dtype: what the weights are stored in.
        seed: the same seed gives the same bytes.
        max_shard_size: as `save_pretrained` takes it.
        stored_head: store the tied output head a second time, in the last shard.
        bare_names: names without the base model's prefix, as gpt2 and bloom have them on the Hub.

    Returns:
        The folder.
    """
    model = make_model(kind, dtype=dtype, seed=seed)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if bare_names:
        _rename(folder, f"{model.base_model_prefix}.")
    if stored_head:
        _store_head(folder, model.get_output_embeddings().weight.detach())
    write_tokenizer(folder)
    return folder


def make_model(kind: str, *, dtype: str = "bfloat16", seed: int = 0) -> Any:
    """A random causal LM; biases and norms are random, too, so that none passes for another."""
    model_type, values = KINDS[kind]
    config = CONFIG_MAPPING[model_type](**{"num_hidden_layers": 2, **_COMMON, **values})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.copy_(_noise(module, name, parameter, generator))
        _zero_a_block(model)
    return model.to(getattr(torch, dtype)).eval()


def _noise(
    module: nn.Module, name: str, like: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Values of the size that a trained weight has: neither vanishing nor exploding layers."""
    noise = torch.randn(like.shape, generator=generator)
    if like.ndim > 1:
        inputs = like.shape[0] if isinstance(module, Conv1D) else like.shape[1]
        return noise / math.sqrt(inputs)
    is_scale = name == "weight" and not type(module).__name__.startswith("Gemma")
    return 0.1 * noise + (1.0 if is_scale else 0.0)


def _zero_a_block(model: Any) -> None:
    """Zeros for the first outputs of one layer: whole blocks of them, which have the scale 0."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, Conv1D):
            module.weight[:, :6] = 0.0
            return
        if module is not head and isinstance(module, nn.Linear):
            module.weight[:6] = 0.0
            return


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes, in the form that every transformers since version 4 reads."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, END])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": 128,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint or an artifact, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        found = load_file(path)
        assert not tensors.keys() & found.keys(), f"{path} holds tensors of another file again"
        tensors |= found
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in their order."""
    return sorted(folder.glob("*.safetensors"))


def _rename(folder: Path, prefix: str) -> None:
    for path in weight_files(folder):
        tensors = {name.removeprefix(prefix): value for name, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text())
        files = index["weight_map"]
        index["weight_map"] = {name.removeprefix(prefix): file for name, file in files.items()}
        (folder / INDEX_FILE).write_text(json.dumps(index))


def _store_head(folder: Path, head: torch.Tensor) -> None:
    path = weight_files(folder)[-1]
    tensors = load_file(path)
    assert HEAD not in tensors, "the head is not tied: it is stored already"
    save_file({**tensors, HEAD: head.contiguous()}, path, metadata={"format": "pt"})
    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text())
        index["weight_map"][HEAD] = path.name
        index["metadata"]["total_size"] += head.nbytes
        (folder / INDEX_FILE).write_text(json.dumps(index))


def falcon(folder: Path) -> Any:
    """The tiny Falcon of the 7B's kind in bfloat16: one set of keys for all heads."""
    make_checkpoint(folder, "falcon-7b")
    return AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").eval()
