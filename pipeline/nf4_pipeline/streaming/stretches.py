"""A file of weights, cut into stretches that are fetched and hashed by themselves."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from nf4_pipeline.checkpoint.plain_file import open_plain
from nf4_pipeline.checkpoint.safetensors_header import HeaderTensor
from nf4_pipeline.documents import Document

LARGEST: Final = 16 * 2**20
"""Bytes of a stretch: few requests for a model, and few bytes in memory at a time."""

_BLOCK: Final = re.compile(r".*?\.\d+\.")
_CHUNK: Final = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch(Document):
    """Bytes of a file, from `start` up to `end`, and their sha256 (hex)."""

    start: int
    end: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedFile(Document):
    """What is known of a file of weights once all of it has been here.

    Attributes:
        size: in bytes.
        sha256: of the file, as the Hub lists it.
        stretches: all bytes of tensors, in their order.
        tensors: sha256 of those that may equal another one, by name.
    """

    size: int
    sha256: str
    stretches: tuple[Stretch, ...]
    tensors: dict[str, str]


def cut(tensors: Sequence[HeaderTensor]) -> list[tuple[int, int]]:
    """Where stretches begin and end.

    A large tensor is cut; small ones that stand side by side in one block of the model are taken
    together. So no stretch belongs to two blocks, and a model that is read block by block needs
    each of them once.

    Args:
        tensors: of the file, in the order of their bytes.
    """
    spans: list[tuple[int, int]] = []
    last: str | None = None
    for tensor in tensors:
        begin, end = tensor.offset, tensor.offset + tensor.nbytes
        found = _BLOCK.match(tensor.name)
        block: str | None = found[0] if found else ""
        if begin == end:
            continue
        if end - begin > LARGEST:
            spans += [(at, min(at + LARGEST, end)) for at in range(begin, end, LARGEST)]
            block = None  # what follows begins a stretch of its own
        elif spans and block == last and end - spans[-1][0] <= LARGEST:
            spans[-1] = spans[-1][0], end
        else:
            spans.append((begin, end))
        last = block
    return spans


def hash_stretches(
    path: Path, tensors: Sequence[HeaderTensor], named: Collection[str], sha256: str
) -> PassedFile:
    """Hashes the stretches of a file whose own hash is known, and some of its tensors.

    Args:
        path: the file.
        tensors: all that it holds, in the order of their bytes.
        named: those that are hashed by themselves, by name.
        sha256: of the file.

    Raises:
        OSError: the file cannot be read.
    """
    with open_plain(path) as file:
        stretches = tuple(
            Stretch(start=start, end=end, sha256=_sha256(file, start, end))
            for start, end in cut(tensors)
        )
        whole = {
            tensor.name: _sha256(file, tensor.offset, tensor.offset + tensor.nbytes)
            for tensor in tensors
            if tensor.name in named
        }
    return PassedFile(size=path.stat().st_size, sha256=sha256, stretches=stretches, tensors=whole)


def _sha256(file: BinaryIO, start: int, end: int) -> str:
    found = hashlib.sha256()
    file.seek(start)
    while start < end and (data := file.read(min(_CHUNK, end - start))):
        found.update(data)
        start += len(data)
    return found.hexdigest()
