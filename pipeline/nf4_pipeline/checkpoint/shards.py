"""Cutting weight files into shards, without parting tensors that belong together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.checkpoint.layout import FileLayout, StoredTensor, plan_layout
from nf4_pipeline.checkpoint.safetensors_header import HeaderTensor, read_header
from nf4_pipeline.checkpoint.sink import WrittenFile
from nf4_pipeline.checkpoint.weight_files import SINGLE_FILE
from nf4_pipeline.checkpoint.writer import writing
from nf4_pipeline.documents import Document
from nf4_pipeline.progress import Task

_CHUNK: Final = 8 * 2**20

Groups = Iterable[Sequence[StoredTensor]]
"""Tensors that must stand in one file, such as a quantized weight and its companions; each group is
named by its first tensor. A tensor that is in none stands by itself."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFacts(Document):
    """A stored tensor, but for its name; `bytes` and `sha256` of its data."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """A weight file of an artifact.

    Attributes:
        name: of the file.
        digest: of the file.
        tensors: its tensors, by name.
    """

    name: str
    digest: FileDigest
    tensors: Mapping[str, TensorFacts]


def name_shards(count: int) -> list[str]:
    """The names that transformers expects."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def split_file(path: Path, limit: int, groups: Groups) -> list[Piece]:
    """Cuts a file into pieces of at most `limit` bytes of tensors, as few as fit in order.

    A single group that is larger than the limit makes a piece of its own.

    Args:
        path: the file.
        limit: bytes of tensors in one piece.
        groups: of the file's tensors.
    """
    parts = split_tensors(read_header(path), path.stat().st_size, limit, groups)
    return [Piece(path, part, whole=len(parts) == 1) for part in parts]


def split_tensors(
    tensors: Sequence[HeaderTensor], file_size: int, limit: int, groups: Groups
) -> list[tuple[HeaderTensor, ...]]:
    """Cuts a file's tensors as `split_file` does, without the file.

    Args:
        tensors: of the file, in the order of its bytes.
        file_size: in bytes, with the header.
        limit: bytes of tensors in one piece.
        groups: of the file's tensors.
    """
    if file_size <= limit:
        return [tuple(tensors)]
    parts: list[list[HeaderTensor]] = []
    size = limit + 1
    for together in _grouped(tensors, groups):
        nbytes = sum(tensor.nbytes for tensor in together)
        if size + nbytes > limit:
            parts.append([])
            size = 0
        parts[-1] += together
        size += nbytes
    return [tuple(part) for part in parts]


def piece_layout(tensors: Sequence[HeaderTensor]) -> FileLayout:
    """The layout of a shard that is cut out of a larger file."""
    return plan_layout(
        StoredTensor(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in tensors
    )


def _grouped(tensors: Sequence[HeaderTensor], groups: Groups) -> list[list[HeaderTensor]]:
    """Tensors that belong together, in the order of the names of the groups' first ones."""
    first = {tensor.name: group[0].name for group in groups if group for tensor in group}
    members: dict[str, list[HeaderTensor]] = {}
    for tensor in tensors:
        members.setdefault(first.get(tensor.name, tensor.name), []).append(tensor)
    return [members[name] for name in sorted(members)]


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


def tensor_facts(written: WrittenFile) -> dict[str, TensorFacts]:
    """The tensors of a file that was written, by name."""
    return {
        tensor.name: TensorFacts(
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            bytes=tensor.nbytes,
            sha256=written.sha256[tensor.name],
        )
        for tensor in written.tensors
    }
