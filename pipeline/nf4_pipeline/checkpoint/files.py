"""Which files of a model repository the pipeline takes, and which of them travel into an export."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from nf4_pipeline.checkpoint.weight_files import INDEX_FILE

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
"""What nearly every tokenizer is made of. What else the class of a tokenizer asks for is learned
from the class (`model/tokenizer_probe.py`)."""

CARD_FILE: Final = "README.md"

_LEGAL_NAME: Final = re.compile(
    r"(?:^|[^a-z])(?:un)?(?:licen[cs]es?|notices?|copying|copyrights?|eula|patents?|legal|terms|"
    r"(?:acceptable[ _-]?)?us(?:e|age)[ _-]?(?:policy|policies|restrictions)|"
    r"prohibited[ _-]?uses?|third[ _-]?party[a-z _-]*|attributions?|disclaimers?)(?:[^a-z]|$)"
)
_LEGAL_ENDINGS: Final = ("", "txt", "md", "rst", "pdf", "html", "htm", "rtf")


def is_wanted(name: str) -> bool:
    """True for a file that `download` takes: weights, configs, tokenizer, license. Never code."""
    patterns = (INDEX_FILE, *CONFIG_FILES, *TOKENIZER_FILES, CARD_FILE)
    return WEIGHT_FILE.fullmatch(name) is not None or _matches(name, patterns) or is_legal(name)


def is_legal(name: str) -> bool:
    """True for a file with terms: LICENSE.txt, USE_POLICY.md, Notice, COPYING, in any case."""
    stem, dot, ending = name.lower().rpartition(".")
    if not dot or len(ending) > 4 or " " in ending:
        stem, ending = name.lower(), ""
    return "/" not in name and ending in _LEGAL_ENDINGS and bool(_LEGAL_NAME.search(stem))


def is_of_tokenizer(name: str) -> bool:
    """True for a file that belongs to a tokenizer, whatever its class."""
    return _matches(name, TOKENIZER_FILES)


def is_tokenizer(name: str) -> bool:
    """True for a file from which a tokenizer can be made."""
    return _matches(name, ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.*"))


def travels(name: str) -> bool:
    """True for a file that `serialize` copies into the export as it is, of those that were taken.

    All do but the weights, and what the export has of its own: config.json and the card.
    """
    return not name.endswith((".safetensors", ".safetensors.index.json")) and name not in (
        "config.json",
        CARD_FILE,
    )


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
