"""A checkpoint folder, read as untrusted data: one safetensors file, or shards and an index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.header import HeaderTensor, read_header
from nf4_pipeline.checkpoint.strict_json import parse_json
from nf4_pipeline.errors import CheckpointError, SourceError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
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
    """

    folder: Path
    files: tuple[str, ...]
    tensors: tuple[SourceTensor, ...]

    def path(self, file: str) -> Path:
        return self.folder / file

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.header.nbytes for tensor in self.tensors)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from an untrusted file.

    Raises:
        CheckpointError: the file is missing or too large, or holds no JSON object.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise CheckpointError(f"{path} is not a file. Copy or download it again.")
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} is larger than {_MAX_JSON_BYTES:,} bytes; no real one is. "
                "Download the file again."
            )
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}). Download the file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object.")
    return value


def has_weights(folder: Path) -> bool:
    """True if a folder has weights in safetensors, whatever else it has."""
    return (folder / INDEX_FILE).is_file() or (folder / SINGLE_FILE).is_file()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads every header of a checkpoint and holds it against the index.

    Raises:
        SourceError: there are no safetensors weights here.
        CheckpointError: a shard is missing or malformed, or the index and the shards disagree.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        return _open_sharded(folder, read_json(index))
    if (folder / SINGLE_FILE).is_file():
        tensors = tuple(SourceTensor(SINGLE_FILE, t) for t in read_header(folder / SINGLE_FILE))
        return Checkpoint(folder, (SINGLE_FILE,), tensors)
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt")
    )
    if pickles:
        raise SourceError(
            f"{folder} holds its weights only as Python pickles ({pickles[0]}, …), which can run "
            "code when they are read. Take a checkpoint in safetensors, or see --allow-pickle of "
            "`nf4 build` and `nf4 download`."
        )
    raise SourceError(f"{folder} holds no weights: expected {INDEX_FILE} or {SINGLE_FILE} in it.")


def _open_sharded(folder: Path, index: dict[str, Any]) -> Checkpoint:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map. Download it again.")
    files = sorted({_shard_name(folder, file) for file in weight_map.values()})
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(files)} shards that {INDEX_FILE} names: "
            f"{', '.join(missing[:5])}. Download the checkpoint again."
        )
    tensors: list[SourceTensor] = []
    held: set[str] = set()
    for file in files:
        for tensor in read_header(folder / file):
            # A shard's tensor that the index forgot is still part of the checkpoint: transformers
            # reads whole shards.
            if weight_map.get(tensor.name, file) == file and tensor.name not in held:
                tensors.append(SourceTensor(file, tensor))
                held.add(tensor.name)
    absent = sorted(set(weight_map) - held)
    if absent:
        raise CheckpointError(
            f"{INDEX_FILE} in {folder} names {len(absent)} tensors that their shards do not hold: "
            f"{absent[0]!r} is not in {weight_map[absent[0]]}. Download the checkpoint again."
        )
    return Checkpoint(folder, tuple(files), tuple(tensors))


def _shard_name(folder: Path, file: object) -> str:
    """A shard must be a plain file name in the folder: an index is not to be trusted with paths."""
    if (
        not isinstance(file, str)
        or Path(file).name != file
        or not file.endswith(".safetensors")
        or not file.isprintable()
    ):
        raise CheckpointError(
            f"{folder / INDEX_FILE} names {str(file)[:80]!r} as a shard; "
            "expected the plain name of a .safetensors file beside it."
        )
    return file
