"""Makes checkpoints with the shapes of falcon-7b and random weights, of any depth, at disk speed.

Sizes and speed do not depend on what the weights are; this is what benchmarks and GPU checks build
when no model can be downloaded. Depth 32 is falcon-7b itself: 14.43 GB in two shards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from nf4_pipeline.checkpoint.layout import StoredTensor, plan_layout
from nf4_pipeline.checkpoint.writer import TensorFile, writing

HIDDEN, HEADS, VOCAB = 4544, 71, 65024
HEAD_DIM = HIDDEN // HEADS
_POOL = 32 * 2**20  # random weights made once and repeated at shifting places


def config(layers: int) -> dict[str, Any]:
    """The config.json of falcon-7b, cut to a depth."""
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "vocab_size": VOCAB,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "new_decoder_architecture": False,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 11,
        "eos_token_id": 11,
        "torch_dtype": "bfloat16",
    }


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """All tensors of the checkpoint in the Hub's order, with the redundant tied head at the end."""
    found: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        name = f"transformer.h.{layer}"
        found |= {
            f"{name}.input_layernorm.weight": (HIDDEN,),
            f"{name}.input_layernorm.bias": (HIDDEN,),
            f"{name}.self_attention.query_key_value.weight": (HIDDEN + 2 * HEAD_DIM, HIDDEN),
            f"{name}.self_attention.dense.weight": (HIDDEN, HIDDEN),
            f"{name}.mlp.dense_h_to_4h.weight": (4 * HIDDEN, HIDDEN),
            f"{name}.mlp.dense_4h_to_h.weight": (HIDDEN, 4 * HIDDEN),
        }
    found |= {"transformer.ln_f.weight": (HIDDEN,), "transformer.ln_f.bias": (HIDDEN,)}
    found["lm_head.weight"] = (VOCAB, HIDDEN)
    return found


def make_checkpoint(folder: Path, layers: int, seed: int = 0, shards: int = 2) -> int:
    """Writes the checkpoint in shards and returns the bytes of its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = [
        StoredTensor(name, "BF16", shape, 2 * int(np.prod(shape)))
        for name, shape in shapes(layers).items()
    ]
    weights = _random_bf16(seed)
    weight_map = {}
    parts = _cut(tensors, shards)
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        with writing(folder / file, plan_layout(part)) as output:
            for tensor in part:
                _fill(output, tensor, weights)
                weight_map[tensor.name] = file
            output.finish()
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(layers), indent=2))
    return total


def _cut(tensors: list[StoredTensor], shards: int) -> list[list[StoredTensor]]:
    """Even shards; of two, the first holds 69 % as falcon-7b's does."""
    total = sum(tensor.nbytes for tensor in tensors)
    first = 0.69 if shards == 2 else 1 / shards
    ends = [total * (first + (1 - first) * i / max(1, shards - 1)) for i in range(shards)]
    parts: list[list[StoredTensor]] = [[] for _ in ends]
    done = 0
    for tensor in tensors:
        parts[next(i for i, end in enumerate(ends) if done < end or i == shards - 1)].append(tensor)
        done += tensor.nbytes
    return [part for part in parts if part]


def _random_bf16(seed: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    values = np.random.default_rng(seed).standard_normal(_POOL, dtype=np.float32) * 0.02
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _fill(output: TensorFile, tensor: StoredTensor, weights: np.ndarray[Any, Any]) -> None:
    """Repeats the pool, shifted by the tensor's name; a tied head gets its embedding's values."""
    name = tensor.name.replace("lm_head", "transformer.word_embeddings")
    start = sum(name.encode()) * 7919 % _POOL
    written = 0
    while written < tensor.nbytes:
        part = weights[start : start + (tensor.nbytes - written) // 2]
        output.write(tensor.name, written, part)
        written += part.nbytes
        start = (start + part.size) % _POOL


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--layers", default=2, show_default=True)
@click.option("--shards", default=2, show_default=True)
def main(folder: Path, layers: int, shards: int) -> None:
    """Write a falcon-7b-shaped checkpoint with random weights to FOLDER."""
    total = make_checkpoint(folder, layers, shards=shards)
    click.echo(f"{folder}: {total / 1e9:.2f} GB, {layers} layers")


if __name__ == "__main__":
    main()
