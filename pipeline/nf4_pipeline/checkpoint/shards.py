"""Cutting weight files into shards. A weight is never parted from its five companions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.checkpoint.header import HeaderTensor, read_header
from nf4_pipeline.checkpoint.layout import FileLayout, plan_layout
from nf4_pipeline.checkpoint.sink import WrittenFile
from nf4_pipeline.checkpoint.weight_files import SINGLE_FILE
from nf4_pipeline.checkpoint.writer import writing
from nf4_pipeline.nf4.layout import QUANT_STATE_SUFFIX, StoredTensor
from nf4_pipeline.progress import Task

_CHUNK: Final = 8 * 2**20


@dataclass(frozen=True)
class Piece:
    """Tensors of one file that will stand in one shard.

    Attributes:
        path: the file.
        tensors: in the order of its bytes.
        whole: they are all of its tensors, so that the file itself can serve.
    """

    path: Path
    tensors: tuple[HeaderTensor, ...]
    whole: bool

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Shard:
    """A weight file of an artifact.

    Attributes:
        name: of the file.
        digest: of the file.
        tensors: name -> {"dtype", "shape", "bytes", "sha256"}.
    """

    name: str
    digest: FileDigest
    tensors: dict[str, dict[str, Any]]


def name_shards(count: int) -> list[str]:
    """The names that transformers expects."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def split_file(path: Path, limit: int) -> list[Piece]:
    """Cuts a file into pieces of at most `limit` bytes of tensors, as few as fit in order.

    A single weight with its companions that is larger than the limit makes a piece of its own.
    """
    groups = split_tensors(read_header(path), path.stat().st_size, limit)
    return [Piece(path, group, whole=len(groups) == 1) for group in groups]


def split_tensors(
    tensors: Sequence[HeaderTensor], file_size: int, limit: int
) -> list[tuple[HeaderTensor, ...]]:
    """Cuts a file's tensors as `split_file` does, without the file.

    Args:
        tensors: of the file, in the order of its bytes.
        file_size: in bytes, with the header.
        limit: bytes of tensors in one piece.
    """
    if file_size <= limit:
        return [tuple(tensors)]
    groups: list[list[HeaderTensor]] = []
    size = limit + 1
    for unit in _units(tensors):
        nbytes = sum(tensor.nbytes for tensor in unit)
        if size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1] += unit
        size += nbytes
    return [tuple(group) for group in groups]


def piece_layout(tensors: Sequence[HeaderTensor]) -> FileLayout:
    """The layout of a shard that is cut out of a larger file."""
    return plan_layout(
        StoredTensor(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in tensors
    )


def _units(tensors: Sequence[HeaderTensor]) -> list[list[HeaderTensor]]:
    """Weights with their companions, and single tensors, by name."""
    weights = {
        tensor.name.removesuffix(QUANT_STATE_SUFFIX)
        for tensor in tensors
        if tensor.name.endswith(QUANT_STATE_SUFFIX)
    }
    units: dict[str, list[HeaderTensor]] = {}
    for tensor in tensors:
        owner = next((name for name in _ancestors(tensor.name) if name in weights), tensor.name)
        units.setdefault(owner, []).append(tensor)
    return [units[name] for name in sorted(units)]


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def write_shard(target: Path, piece: Piece, task: Task) -> Shard:
    """Copies the tensors of a piece into a file of their own."""
    layout = piece_layout(piece.tensors)
    with piece.path.open("rb") as source, writing(target, layout) as output:
        for tensor in piece.tensors:
            for start in range(0, tensor.nbytes, _CHUNK):
                source.seek(tensor.offset + start)
                data = source.read(min(_CHUNK, tensor.nbytes - start))
                output.write(tensor.name, start, data)
                task.advance(len(data))
        written = output.finish()
    return Shard(target.name, written.digest, tensor_facts(written))


def tensor_facts(written: WrittenFile) -> dict[str, Any]:
    """What the manifest says of each stored tensor, by name."""
    return {
        tensor.name: {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
            "sha256": written.sha256[tensor.name],
        }
        for tensor in written.tensors
    }
