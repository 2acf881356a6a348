"""Tensors cut into chunks of whole blocks, and the reading of one chunk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.checkpoint.safetensors_header import DTYPE_BYTES
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.selection import TensorPlan


@dataclass(frozen=True)
class Chunk:
    """A run of elements of one output tensor.

    Attributes:
        tensor: what it belongs to.
        start: its first element; a multiple of the block size.
        count: how many elements.
    """

    tensor: TensorPlan
    start: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * DTYPE_BYTES[self.tensor.source.header.dtype]


class Source(Protocol):
    """A file of the checkpoint, wherever its bytes come from; used from several threads."""

    def read(self, view: NDArray[np.uint8], offset: int, tensor: TensorPlan) -> None:
        """Fills `view` with the bytes from `offset` on; they are of `tensor`."""

    def will_read(self, chunk: Chunk, offset: int | None = None) -> None:
        """Is told what will be read soon; `offset` as in `OpenFile`."""


@dataclass(frozen=True)
class OpenFile:
    """A file on this disk.

    Attributes:
        descriptor: of the open file.
    """

    descriptor: int

    def read(self, view: NDArray[np.uint8], offset: int, tensor: TensorPlan) -> None:
        """Fills `view` with the file's bytes from `offset` on.

        Raises:
            CheckpointError: the file cannot be read, or ends before them; `tensor` is named.
        """
        done = 0
        while done < view.size:
            try:
                count = os.preadv(self.descriptor, [view.data[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{tensor.source.file} cannot be read at byte {offset + done:,}: "
                    f"{error.strerror}. Look at the disk that holds the source, then run the same "
                    "command again."
                ) from error
            if count == 0:
                source = tensor.source
                raise CheckpointError(
                    f"{source.file} ended in the middle of {source.name!r}: it became shorter "
                    "while it was read. Download the checkpoint again."
                )
            done += count

    def will_read(self, chunk: Chunk, offset: int | None = None) -> None:
        """Tells the system that a chunk will be read soon, so that the disk always has work.

        A hint: where there is no such call, or it is refused, or the chunk is not one run of bytes,
        nothing happens.

        Args:
            chunk: what will be read.
            offset: in the file of the tensor it belongs to, if that is not the chunk's own.
        """
        if not hasattr(os, "posix_fadvise") or chunk.tensor.transposed or chunk.nbytes == 0:
            return  # no bytes would mean all bytes
        header = chunk.tensor.source.header
        start = header.offset if offset is None else offset
        start += chunk.start * DTYPE_BYTES[header.dtype]
        with suppress(OSError):
            os.posix_fadvise(self.descriptor, start, chunk.nbytes, os.POSIX_FADV_WILLNEED)


def cut(tensor: TensorPlan, chunk_bytes: int) -> Iterator[Chunk]:
    """The chunks of a tensor, in order. A transposed tensor is cut at whole output rows."""
    size = DTYPE_BYTES[tensor.source.header.dtype]
    total = prod(tensor.shape)
    step = BLOCK_SIZE
    if tensor.transposed:
        width = tensor.shape[1]
        step = width * (BLOCK_SIZE // gcd(width, BLOCK_SIZE))
    per_chunk = max(step, chunk_bytes // size // step * step)
    for start in range(0, total, per_chunk):
        yield Chunk(tensor, start, min(per_chunk, total - start))
    if total == 0:
        yield Chunk(tensor, 0, 0)


def read_chunk(source: Source, chunk: Chunk, buffer: NDArray[np.uint8]) -> NDArray[Any]:
    """Reads a chunk's elements as unsigned integers of their width.

    Args:
        source: the file that holds it.
        chunk: what to read.
        buffer: at least `chunk.nbytes` long; the result may stand in it.

    Returns:
        [count], uint8, uint16, uint32 or uint64 by the width of the dtype, in output order.
    """
    header = chunk.tensor.source.header
    size = DTYPE_BYTES[header.dtype]
    kind = np.dtype(f"u{size}")
    if chunk.tensor.transposed:
        return _read_transposed(source, chunk, kind)
    view = buffer[: chunk.nbytes]
    source.read(view, header.offset + chunk.start * size, chunk.tensor)
    return view.view(kind)


def _read_transposed(source: Source, chunk: Chunk, kind: np.dtype[Any]) -> NDArray[Any]:
    """Columns of the source matrix [in, out] as rows of the output [out, in]."""
    header = chunk.tensor.source.header
    rows, columns = header.shape
    first, last = chunk.start // rows, (chunk.start + chunk.count) // rows
    strip = np.empty((rows, last - first), kind)
    for row in range(rows):
        offset = header.offset + (row * columns + first) * kind.itemsize
        source.read(strip[row].view(np.uint8), offset, chunk.tensor)
    return np.ascontiguousarray(strip.T).reshape(-1)
