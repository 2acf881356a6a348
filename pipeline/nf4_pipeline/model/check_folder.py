"""The one door to a model folder: everything that opens one has it looked at here first.

Local checkpoints, exports, builds and snapshots of the Hub's cache alike, whether a build, a prompt
or a user's own program asks. What passes is not believed, but it cannot lead out of the folder, nor
ask for more than the folder holds.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.lfs_pointer import check_no_pointer
from nf4_pipeline.checkpoint.named_path import problem_of
from nf4_pipeline.checkpoint.source import Checkpoint, open_checkpoint, read_json, weight_files
from nf4_pipeline.checkpoint.untrusted import check_file, check_folder
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.model.config import CONFIG_FILE, causal_lm_config, read_config
from nf4_pipeline.model.config_limits import check_config_limits
from nf4_pipeline.model.meta_model import build_meta_model
from nf4_pipeline.processes.phase import PhaseLimits, limited

_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_TOKENS_MAP: Final = "special_tokens_map.json"
_NAMES_FILES: Final = "fast_tokenizer_files"
_FILE_ARGUMENT: Final = re.compile(r"(.*_)?(vocab|merges|file|spm)")
"""What tokenizers take a path for: vocab_file, merges, source_spm …"""
_NEVER_OPENED: Final = ("special_tokens_map_file", "added_tokens_file")
_HUB_CODE: Final = re.compile(r"_?(attn|experts)_implementation(_internal)?")
"""Keys of a config that may name a repository whose code computes attention or experts."""

_BUILD_SECONDS: Final = 20.0
_TENSORS_A_SECOND: Final = 200
"""Models of some hundred billion weights are built without weights in less than a minute."""
_BUILD_BYTES: Final = 2**30

_WEIGHTS_A_BYTE: Final = 4
"""Of integers, which may be packed: two bits are the least that anybody stores a weight in."""
_FREE_WEIGHTS: Final = 2**24
_SPARE: Final = 1.25


def check_small_files(folder: Path) -> dict[str, Any]:
    """What can be known without the weights being there; returns config.json.

    Raises:
        SourceError: the folder has no config.json.
        CheckpointError: a file leads out of the folder, is larger than any real one, or is not what
            its name says; or config.json names code on the Hub.
    """
    check_folder(folder)
    if (folder / _TOKENIZER_CONFIG).is_file():
        _check_names(folder / _TOKENIZER_CONFIG)
        _check_arguments(folder / _TOKENIZER_CONFIG)
    if (folder / _TOKENS_MAP).is_file():
        _check_arguments(folder / _TOKENS_MAP)
    config = read_config(folder)
    _check_no_hub_code(config, folder / CONFIG_FILE)
    return config


def check_headers(folder: Path) -> Checkpoint:
    """What can be known from the headers of the weights; returns them.

    Raises:
        SourceError: there are no weights in safetensors.
        CheckpointError: weights are missing, malformed or pointers, or config.json says what they
            cannot be.
    """
    chosen = weight_files(folder)
    for file in chosen.files if chosen else ():
        if (folder / file).is_file():
            check_file(folder, file)
            check_no_pointer(folder / file)
    checkpoint = open_checkpoint(folder)
    check_config_limits(read_config(folder), checkpoint)
    return checkpoint


def check_model_fits(checkpoint: Checkpoint) -> None:
    """Builds the model without weights, and refuses one that is larger than the files.

    Whoever loads it gives memory to every parameter, whether a file has values for it or not. In a
    child, building is limited (`phase.py`).

    Raises:
        ArchitectureError: config.json makes no causal LM.
        CheckpointError: building takes too long or too much memory, or the model has more weights
            than the files can hold.
    """
    folder = checkpoint.folder
    with building(folder, build_seconds(len(checkpoint.tensors))):
        model = build_meta_model(causal_lm_config(read_config(folder), folder))
        weights = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    held = sum(
        tensor.header.nbytes * _WEIGHTS_A_BYTE
        if tensor.header.dtype.startswith(("I", "U"))
        else tensor.header.nbytes
        for tensor in checkpoint.tensors
    )
    if weights > _SPARE * held + _FREE_WEIGHTS:
        raise CheckpointError(
            f"{folder / 'config.json'} describes a model of {weights:,} weights, and the files "
            f"beside it hold {checkpoint.nbytes:,} bytes. The weights and the config do not belong "
            "together."
        )


def build_seconds(tensors: int) -> float:
    """How long building a model without weights may take.

    Args:
        tensors: of its checkpoint.
    """
    return _BUILD_SECONDS + tensors / _TENSORS_A_SECOND


def building(folder: Path, seconds: float = _BUILD_SECONDS) -> Any:
    """The phase in which a model is built from a config without weights.

    Args:
        folder: of the model.
        seconds: that it may take.
    """
    return limited(
        f"building the model of {folder} without weights",
        PhaseLimits(seconds, _BUILD_BYTES),
        "See that config.json belongs to the weights beside it.",
        CheckpointError,
    )


def _check_names(path: Path) -> None:
    """Refuses names of files that transformers would follow out of the folder."""
    named = read_json(path).get(_NAMES_FILES)
    names = named if isinstance(named, list) else [] if named is None else [named]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
            raise CheckpointError(
                f'{path} names {str(name)[:80]!r} among its "{_NAMES_FILES}"; expected plain names '
                "of files beside it. Take that key out, or bring the file again."
            )


def _check_arguments(path: Path) -> None:
    """Refuses paths that a tokenizer's class would be given in the place of its own files.

    transformers puts its own over what tokenizer_config.json says of most of them, but not over
    vocabularies that are said by name, nor over anything in special_tokens_map.json. Old paths of
    its maker's machine are in many a tokenizer_config.json; they lead nowhere here.
    """
    is_config = path.name == _TOKENIZER_CONFIG
    for name, value in read_json(path).items():
        if value is None or not _FILE_ARGUMENT.fullmatch(name):
            continue
        if is_config and (not isinstance(value, str) or _is_harmless(name, value)):
            continue
        raise CheckpointError(
            f"{path} gives {str(value)[:80]!r} as {name[:80]!r}, and a tokenizer would open it; "
            "expected its files beside it, under their usual names. Take that key out, or bring "
            "the file again."
        )


def _is_harmless(name: str, value: str) -> bool:
    """Whether transformers opens another file instead, and this is none of this machine's."""
    if not name.endswith("_file"):
        return False
    is_plain = Path(value).name == value or problem_of(value) is not None
    return name in _NEVER_OPENED or is_plain or not os.path.lexists(value)


def _check_no_hub_code(value: Any, path: Path) -> None:
    """Refuses "attn_implementation": "ORG/NAME": transformers would fetch its code and run it."""
    if isinstance(value, list):
        for item in value:
            _check_no_hub_code(item, path)
    for name, item in value.items() if isinstance(value, dict) else ():
        if _HUB_CODE.fullmatch(name) and "/" in str(item):
            raise CheckpointError(
                f"{path} names code on the Hub under {name!r}: {str(item)[:80]!r}. No code comes "
                "with a model here. Take that key out: it changes no weight."
            )
        _check_no_hub_code(item, path)
