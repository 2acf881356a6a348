"""The files of an artifact beside its weights and its manifest, as bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nf4_pipeline.checkpoint.atomic import json_bytes
from nf4_pipeline.checkpoint.files import travels
from nf4_pipeline.checkpoint.shards import Shard
from nf4_pipeline.checkpoint.source import read_json
from nf4_pipeline.manifest.manifest import StoredTensorEntry
from nf4_pipeline.model.config import CONFIG_FILE, read_config, without_remote_code
from nf4_pipeline.selection import QUANTIZABLE_DTYPES, Plan


def small_files(
    source: Path, names: Iterable[str], plan: Plan, model_class: str
) -> dict[str, bytes]:
    """config.json with its quantization config, and the files that travel as they are.

    Args:
        source: the checkpoint folder.
        names: of the files that were taken from it.
        plan: what happens to each tensor.
        model_class: the causal LM class.
    """
    config = without_remote_code(read_config(source))
    config["architectures"] = [model_class]
    dtype = str(config.get("dtype") or config.get("torch_dtype"))
    if dtype not in QUANTIZABLE_DTYPES.values():
        stored = Counter(tensor.source.header.dtype for tensor in plan.quantized)
        dtype = QUANTIZABLE_DTYPES[stored.most_common(1)[0][0]]
        config["torch_dtype"] = dtype
    config["quantization_config"] = quantization_config(dtype, plan)
    # Configs of state-space models hold an Infinity, which every reader of theirs takes.
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    written = {CONFIG_FILE: text.encode()}
    for name in names:
        if travels(name):
            written[name] = _without_remote_tokenizer(name, source / name)
    return dict(sorted(written.items()))


def _without_remote_tokenizer(name: str, path: Path) -> bytes:
    """A tokenizer config may point at code that does not come along; everything else is exact."""
    content = path.read_bytes()
    if name != "tokenizer_config.json" or b'"auto_map"' not in content:
        return content
    return json_bytes(without_remote_code(read_json(path)))


def quantization_config(dtype: str, plan: Plan) -> dict[str, Any]:
    """What config.json tells transformers: the values of a `BitsAndBytesConfig`.

    Args:
        dtype: in which 4-bit layers compute, such as "bfloat16".
        plan: which modules are not 4 bit, and what the codebook is called.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": plan.quant_type,
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(plan.skip_modules),
        "llm_int8_threshold": 6.0,
    }


def weight_index(shards: Sequence[Shard]) -> dict[str, Any]:
    """model.safetensors.index.json of an artifact with several weight files."""
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    total = sum(part.bytes for shard in shards for part in shard.tensors.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def stored_tensors_of(shards: Sequence[Shard]) -> dict[str, StoredTensorEntry]:
    """What the manifest says of each stored tensor of some shards, by name."""
    return {
        name: StoredTensorEntry(
            name=name,
            file=shard.name,
            dtype=part.dtype,
            shape=part.shape,
            bytes=part.bytes,
            sha256=part.sha256,
        )
        for shard in shards
        for name, part in shard.tensors.items()
    }
