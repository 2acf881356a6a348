"""Which files of a model repository the pipeline takes, and which of them travel into an export."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

# No dot between "model" and the suffix: model.fp16.safetensors is a second copy of the weights.
WEIGHT_FILE: Final = re.compile(r"model[^./]*\.safetensors")

# The same weights as Python pickles.
PICKLE_FILE: Final = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin")

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
    patterns = ("model.safetensors.index.json", *CONFIG_FILES, *TOKENIZER_FILES, *LEGAL_FILES)
    return WEIGHT_FILE.fullmatch(name) is not None or _matches(name, patterns)


def is_tokenizer(name: str) -> bool:
    """True for a file from which a tokenizer can be made."""
    return _matches(name, ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.*"))


def travels(name: str) -> bool:
    """True for a file that `serialize` copies into the export as it is."""
    return _matches(name, ("generation_config.json", *TOKENIZER_FILES, "LICENSE*", "NOTICE*"))


def entries(folder: Path) -> dict[str, Path]:
    """Everything in a folder and below it that is not a folder itself, links included, by path."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Glob patterns in which `*` does not cross a slash."""
    return any(
        pattern.count("/") == name.count("/") and fnmatchcase(name, pattern) for pattern in patterns
    )
