"""A file of weights, cut into stretches that are fetched and hashed by themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from nf4_pipeline.checkpoint.block_names import numbered_block
from nf4_pipeline.checkpoint.safetensors_header import HeaderTensor
from nf4_pipeline.documents import Document
from nf4_pipeline.errors import HubError

LARGEST: Final = 16 * 2**20
"""Bytes of a stretch: few requests for a model, and few bytes in memory at a time."""

Fetch = Callable[[str, int, int], bytes]
"""Fetches bytes of a file: its name, where they begin, where they end."""


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
    tensors: Mapping[str, str]


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
        block: str | None = numbered_block(tensor.name)
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


def fetch_right(fetch: Fetch, file: str, stretch: Stretch) -> bytes:
    """Fetches a stretch; once more, if it came wrong.

    Raises:
        HubError: the Hub refuses, does not answer, or gave other bytes twice.
    """
    for _ in range(2):
        data = fetch(file, stretch.start, stretch.end)
        if hashlib.sha256(data).hexdigest() == stretch.sha256:
            return data
    raise HubError(
        f"{file}: bytes {stretch.start:,} to {stretch.end:,} came wrong twice: expected sha256 "
        f"{stretch.sha256}. Look for a proxy or mirror that alters files, or try later."
    )
