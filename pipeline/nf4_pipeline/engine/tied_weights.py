"""Tied tensors that a checkpoint stores twice: held against each other as one of them is copied.

The plan drops the second one on the word of the config. If they differ after all, the work stops
and the plan is made anew with both kept; that costs a second run, and happens to hardly any model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.checkpoint.plain_file import open_plain
from nf4_pipeline.checkpoint.source import Checkpoint
from nf4_pipeline.engine.chunks import Chunk, Source
from nf4_pipeline.errors import TiedWeightsDiffer
from nf4_pipeline.selection import TensorPlan

_PIECE: Final = 4 * 2**20


@dataclass(frozen=True)
class TiedTensor:
    """A tensor that is dropped because it equals another.

    Attributes:
        tensor: its plan.
        file: that holds it.
    """

    tensor: TensorPlan
    file: Source

    def announce(self, chunk: Chunk) -> None:
        """Has the system begin to read what `check` will compare a chunk with."""
        self.file.will_read(chunk, self.tensor.source.header.offset)

    def check(self, data: NDArray[Any], chunk: Chunk, buffer: NDArray[np.uint8]) -> None:
        """Holds a chunk of the other tensor against the same place of this one.

        Args:
            data: the chunk's elements.
            chunk: what they are.
            buffer: as long as they are; receives this tensor's.

        Raises:
            TiedWeightsDiffer: the two differ in dtype, in shape, or in a byte of the chunk.
        """
        own, other = self.tensor.source.header, chunk.tensor.source.header
        same = (own.dtype, own.shape) == (other.dtype, other.shape)
        if same:
            offset = own.offset + chunk.start * data.itemsize
            self.file.read(buffer, offset, self.tensor)
            same = _equal(data.view(np.uint8), buffer)
        if not same:
            raise TiedWeightsDiffer(self.tensor.source.name)


def equals_twin(tensor: TensorPlan, checkpoint: Checkpoint) -> bool:
    """Whether a tensor has the bytes of the one that it is tied to; reads both, in pieces.

    Args:
        tensor: one with `tied_to`.
        checkpoint: that holds both.
    """
    twin = next(other for other in checkpoint.tensors if other.name == tensor.tied_to)
    own = tensor.source
    if (own.header.dtype, own.header.shape) != (twin.header.dtype, twin.header.shape):
        return False
    with (
        open_plain(checkpoint.path(own.file)) as first,
        open_plain(checkpoint.path(twin.file)) as second,
    ):
        first.seek(own.header.offset)
        second.seek(twin.header.offset)
        left = own.header.nbytes
        while left:
            pieces = [file.read(min(left, _PIECE)) for file in (first, second)]
            if not pieces[0] or pieces[0] != pieces[1]:
                return False
            left -= len(pieces[0])
    return True


def _equal(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Whether bytes are the same; eight at a time, since numpy compares element by element."""
    wide = one.size // 8 * 8
    return np.array_equal(one[:wide].view(np.uint64), other[:wide].view(np.uint64)) and (
        np.array_equal(one[wide:], other[wide:])
    )
