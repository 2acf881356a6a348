"""A checkpoint folder, read as untrusted data: one safetensors file, or shards and an index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.folder_advice import how_to_complete, without_weights
from nf4_pipeline.checkpoint.plain_file import read_plain
from nf4_pipeline.checkpoint.safetensors_header import (
    HeaderTensor,
    check_headers_bytes,
    read_header,
)
from nf4_pipeline.checkpoint.strict_json import parse_json
from nf4_pipeline.checkpoint.weight_files import WeightFiles, choose_weight_files
from nf4_pipeline.errors import CheckpointError, SourceError

_MAX_JSON_BYTES: Final = 32 * 2**20


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the checkpoint and the file (a name in the folder) that holds it."""

    file: str
    header: HeaderTensor

    @property
    def name(self) -> str:
        return self.header.name


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds, from its headers alone.

    Attributes:
        folder: where the files are.
        files: the names of the weight files, in their order.
        tensors: all tensors, by file and by position in it.
        index: the file that names the weight files, if one does.
        promised: tensors that the index names and no file holds, and the file it gives for each.
    """

    folder: Path
    files: tuple[str, ...]
    tensors: tuple[SourceTensor, ...]
    index: str | None = None
    promised: Mapping[str, str] = field(default_factory=dict)

    def path(self, file: str) -> Path:
        return self.folder / file

    def tensors_in(self, file: str) -> tuple[SourceTensor, ...]:
        """The tensors of one file, in the order of their bytes."""
        found = [tensor for tensor in self.tensors if tensor.file == file]
        return tuple(sorted(found, key=lambda tensor: tensor.header.offset))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.header.nbytes for tensor in self.tensors)


def read_json(path: Path, *, finite: bool = False) -> dict[str, Any]:
    """A JSON object from an untrusted file.

    Args:
        path: the file.
        finite: refuse numbers that JSON does not have, such as NaN and 1e999.

    Raises:
        CheckpointError: the file is missing, no plain file or too large, or holds no JSON object.
    """
    try:
        value = parse_json(read_plain(path, _MAX_JSON_BYTES), finite=finite)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}. Copy or download the file again."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}). Download the file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object.")
    return value


def weight_files(folder: Path) -> WeightFiles | None:
    """The weight files that transformers would load, or None if there are none in safetensors.

    Raises:
        CheckpointError: config.json or the index is malformed, or names no file of the folder.
    """
    config = folder / "config.json"
    return choose_weight_files(
        {path.name for path in folder.glob("*.safetensors*") if path.is_file()},
        read_json(config) if config.is_file() else {},
        lambda name: read_json(folder / name),
        str(folder),
    )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads every header of the weight files that transformers would load.

    Raises:
        SourceError: there are no safetensors weights here.
        CheckpointError: a file is missing or malformed, or all headers together are larger than
            those of any real model.
    """
    chosen = weight_files(folder)
    if chosen is None:
        raise SourceError(without_weights(folder))
    missing = [file for file in chosen.files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(chosen.files)} shards that {chosen.index} "
            f"names: {', '.join(missing[:5])}. {how_to_complete(folder, missing[0])}"
        )
    check_headers_bytes(folder, chosen.files)
    last: dict[str, SourceTensor] = {}
    for file in chosen.files:
        for tensor in read_header(folder / file):
            # As transformers reads: of two tensors of one name the later file's is the model's.
            last.pop(tensor.name, None)
            last[tensor.name] = SourceTensor(file, tensor)
    promised = {name: str(file) for name, file in chosen.promised.items() if name not in last}
    return Checkpoint(folder, chosen.files, tuple(last.values()), chosen.index, promised)
