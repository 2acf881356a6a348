"""Which files of a model repository the pipeline takes, and which of them travel into an export."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Final

WEIGHT_FILES: Final = ("model*.safetensors", "model.safetensors.index.json")

CONFIG_FILES: Final = ("config.json", "generation_config.json")

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)

LEGAL_FILES: Final = ("LICENSE*", "NOTICE*", "README.md")


def is_wanted(name: str) -> bool:
    """True for a file that `download` takes: weights, configs, tokenizer, license. Never code."""
    patterns = WEIGHT_FILES + CONFIG_FILES + TOKENIZER_FILES + LEGAL_FILES
    return any(fnmatch(name, pattern) for pattern in patterns)


def travels(name: str) -> bool:
    """True for a file that `serialize` copies into the export as it is."""
    patterns = ("generation_config.json", *TOKENIZER_FILES, "LICENSE*", "NOTICE*")
    return any(fnmatch(name, pattern) for pattern in patterns)
