"""Blocks by the names of tensors alone, against those that a model has."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import pytest
import torch
import transformers
from nf4_pipeline.blocks.find_blocks import block_of, find_blocks
from nf4_pipeline.calibration import learning_plan
from nf4_pipeline.checkpoint.block_names import numbered_block
from nf4_pipeline.checkpoint.safetensors_header import HeaderTensor
from nf4_pipeline.checkpoint.source import SourceTensor
from nf4_pipeline.selection import Plan, TensorPlan
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.support.checkpoints import KINDS
from tests.support.decoders import DECODERS


@cache
def model_of(name: str) -> Any:
    """One without weights; where it may have eleven blocks, two of their names begin alike."""
    layers = {"num_hidden_layers": 11}
    if name in KINDS:
        kind, values = KINDS[name]
        config = CONFIG_MAPPING[kind](**values, **layers)
    else:
        prefix, values = DECODERS[name]
        config = getattr(transformers, f"{prefix}Config")(**values)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", [*KINDS, *DECODERS])
def test_names_say_what_the_model_says(name: str) -> None:
    """Also where a checkpoint leaves out the base model's prefix, as gpt2's and bloom's do."""
    model = model_of(name)
    blocks, prefix = find_blocks(model), f"{model.base_model_prefix}."
    assert len(blocks) >= 2
    for tensor in model.state_dict():
        block = block_of(tensor, blocks)
        assert numbered_block(tensor) == block
        assert numbered_block(tensor.removeprefix(prefix)) == block.removeprefix(prefix)


@pytest.mark.parametrize("name", [*KINDS, *DECODERS])
def test_memory_by_block_is_that_of_the_models_blocks(name: str) -> None:
    """All that is outside of them twice; of the largest, four in all, and what its codes take."""
    model = model_of(name)
    blocks = find_blocks(model)
    weights: dict[str, int] = {}
    tensors = []
    for tensor, value in model.state_dict().items():
        block = block_of(tensor, blocks)
        weights[block] = weights.get(block, 0) + value.numel()
        header = HeaderTensor(tensor, "BF16", tuple(value.shape), 0, 2 * value.numel())
        tensors.append(TensorPlan(SourceTensor("f", header), tensor, "keep", ""))
    plan = Plan(tuple(tensors), (), (), ())
    outside = weights.pop("")
    found = learning_plan.memory_by_block(plan, (), "cpu") - 2**29
    assert found == 2 * outside * 4 + max(weights.values()) * (4 * 4 + 2)
    assert sum(prod(t.shape) for t in tensors) == outside + sum(weights.values())


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("h.0.attn.bias", "h.0"),
        ("transformer.h.10.mlp.c_fc.weight", "transformer.h.10"),
        ("gpt_neox.layers.0.attention.dense.weight", "gpt_neox.layers.0"),
        ("model.decoder.layers.3.fc1.weight", "model.decoder.layers.3"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", "model.layers.0"),
        ("layers.0.experts.3.w1.weight", "layers.0"),
        ("model.layers.7.block_sparse_moe.experts.11.w2.weight", "model.layers.7"),
        ("model.language_model.layers.2.self_attn.q_proj.weight", "model.language_model.layers.2"),
        ("backbone.layers.1.mixer.A_log", "backbone.layers.1"),
        ("lm_head.weight", ""),
        ("model.norm.weight", ""),
        ("model.embed_tokens.weight", ""),
        ("transformer.ln_f2.weight", ""),
        ("layer1.weight", ""),
    ],
)
def test_other_names(name: str, block: str) -> None:
    assert numbered_block(name) == block
