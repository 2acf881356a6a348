"""An untrusted folder, before anything in it is believed: links, sizes, small files."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from nf4_pipeline.checkpoint.files import is_legal, is_wanted
from nf4_pipeline.checkpoint.folder_advice import dead_link
from nf4_pipeline.checkpoint.generation_config import GENERATION_CONFIG, check_generation_config
from nf4_pipeline.checkpoint.lfs_pointer import check_no_pointer
from nf4_pipeline.checkpoint.source import read_json
from nf4_pipeline.errors import CheckpointError

_MIB: Final = 2**20
_SIZE_LIMITS: Final = (
    ("config.json", 4 * _MIB),
    ("generation_config.json", _MIB),
    ("*.index.json", 32 * _MIB),
    ("tokenizer_config.json", 32 * _MIB),
    ("special_tokens_map.json", 32 * _MIB),
    ("added_tokens.json", 32 * _MIB),
    ("chat_template.*", 4 * _MIB),
    ("additional_chat_templates/*", 4 * _MIB),
    ("*.md", 16 * _MIB),
    ("*", 256 * _MIB),
)
"""Bytes that a file beside the weights may have; the largest real tokenizers have 35 MB."""

_LEGAL_LIMIT: Final = 16 * _MIB

_OBJECTS: Final = (
    GENERATION_CONFIG,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Small files that must be JSON objects; the libraries that read them presume it."""


def check_folder(folder: Path) -> None:
    """Looks at every file of a checkpoint folder that would be taken, without reading weights.

    Raises:
        CheckpointError: a file is a link to somewhere else, is too large, or is not what its name
            says.
    """
    for path in sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")]):
        name = path.relative_to(folder).as_posix()
        if is_wanted(name):
            check_file(folder, name)


def check_file(folder: Path, name: str) -> None:
    """Looks at one file of a checkpoint folder that will be taken.

    Raises:
        CheckpointError: the file is a link to somewhere else or to nothing, no plain file, a Git
            LFS pointer, too large, or not what its name says.
    """
    path = folder / name
    if (link := dead_link(path)) is not None:
        raise CheckpointError(link)
    _check_link(folder, name)
    if name.endswith(".safetensors"):
        _check_is_file(path)
        return
    check_size(path, name)
    check_no_pointer(path)
    if name in _OBJECTS:
        value = read_json(path, finite=True)
        if name == GENERATION_CONFIG:
            check_generation_config(value, path)


def check_size(path: Path, name: str) -> None:
    """Refuses a small file that is larger than any real one of its name.

    Raises:
        CheckpointError: the file is larger than any real one of its name, or is not a file.
    """
    _check_is_file(path)
    limit = size_limit(name)
    size = path.stat().st_size
    if size > limit:
        raise CheckpointError(
            f"{path} has {size:,} bytes; no real {name} has more than {limit:,}. "
            "Download the file again."
        )


def size_limit(name: str) -> int:
    """Bytes that a file beside the weights may have, by its name."""
    limit = next(size for pattern, size in _SIZE_LIMITS if fnmatchcase(name, pattern))
    return min(limit, _LEGAL_LIMIT) if is_legal(name) else limit


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file. Copy or download the checkpoint again.")


def _check_link(folder: Path, name: str) -> None:
    """A link may stay in its folder, or lead from a snapshot of the Hub cache to its blobs.

    Any other could carry a private file of this machine into what is published.
    """
    path = folder / name
    real, home = path.resolve(), folder.resolve()
    if real.is_relative_to(home):
        return
    is_snapshot = home.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", home.name)
    if is_snapshot and real.is_relative_to(home.parents[1] / "blobs"):
        return
    raise CheckpointError(
        f"{path} is a link out of its folder, to {real}. Name the folder that holds the file "
        "itself, or copy it there."
    )
