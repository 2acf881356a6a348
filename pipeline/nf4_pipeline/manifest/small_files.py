"""The files of an artifact beside its weights and its manifest, as bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nf4_pipeline.checkpoint.atomic import json_bytes
from nf4_pipeline.checkpoint.files import travels
from nf4_pipeline.checkpoint.plain_file import read_plain
from nf4_pipeline.checkpoint.shards import Shard
from nf4_pipeline.checkpoint.source import read_json
from nf4_pipeline.checkpoint.untrusted import size_limit
from nf4_pipeline.documents import Document
from nf4_pipeline.manifest.manifest import StoredTensorEntry
from nf4_pipeline.model.config import CONFIG_FILE, read_config, without_remote_code
from nf4_pipeline.selection import QUANTIZABLE_DTYPES, Plan, model_dtype

TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_NOT_FOR_ALL: Final = b'"auto_map"', b'"TokenizersBackend"', b'"extra_special_tokens"'


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
    said = str(config.get("dtype") or config.get("torch_dtype"))
    dtype = QUANTIZABLE_DTYPES[model_dtype(said, plan.tensors)]
    if dtype != said:
        config["torch_dtype"] = dtype
    config["quantization_config"] = quantization_config(dtype, plan)
    # Configs of state-space models hold an Infinity, which every reader of theirs takes.
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    written = {CONFIG_FILE: text.encode()}
    for name in names:
        if travels(name):
            path = source / name
            written[name] = (
                tokenizer_config(path)
                if name == TOKENIZER_CONFIG
                else read_plain(path, size_limit(name))
            )
    return dict(sorted(written.items()))


def tokenizer_config(path: Path) -> bytes:
    """A tokenizer_config.json that every version of transformers reads; most are exact copies.

    What points at code that does not come along goes. transformers 5 writes a class that 4 does not
    have, and a list under a name that is of objects there; both know the older names.

    Args:
        path: of the source's file.

    Raises:
        CheckpointError: the file says one of these things and is not a JSON object.
    """
    content = read_plain(path, size_limit(TOKENIZER_CONFIG))
    if not any(word in content for word in _NOT_FOR_ALL):
        return content
    said = read_json(path)
    config = without_remote_code(said)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    special = config.get("extra_special_tokens")
    if isinstance(special, list) and "additional_special_tokens" not in config:
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = special
    return content if config == said else json_bytes(config)


def quantization_config(dtype: str, plan: Plan) -> dict[str, str | bool | float | list[str]]:
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


@dataclass(frozen=True)
class IndexMetadata(Document):
    """What an index says of all files together: the bytes of their tensors."""

    total_size: int


@dataclass(frozen=True)
class WeightIndex(Document):
    """Which file holds which tensor.

    Attributes:
        metadata: of all files together.
        weight_map: name of a tensor -> its file.
    """

    metadata: IndexMetadata
    weight_map: dict[str, str]


def weight_index(shards: Sequence[Shard]) -> WeightIndex:
    """model.safetensors.index.json of an artifact with several weight files."""
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    total = sum(part.bytes for shard in shards for part in shard.tensors.values())
    return WeightIndex(IndexMetadata(total), dict(sorted(weight_map.items())))


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
