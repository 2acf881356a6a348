"""Tied tensors that a checkpoint stores twice: held against each other while the rest is quantized.

The plan drops the second one on the word of the config. If they differ after all, the work stops
and the plan is made anew with both kept; that costs a second run, and happens to hardly any model.
"""

from __future__ import annotations

import numpy as np

from pipeline.checkpoint.source import SourceTensor
from pipeline.engine.chunks import Chunk, read_chunk, read_range
from pipeline.engine.filejob import ThreadBuffers
from pipeline.errors import SourceError


class TwinsDifferError(SourceError):
    """A tensor that was to be dropped does not equal its twin."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name!r} does not equal the tensor to which it is tied.")
        self.name = name


def compare_chunk(
    chunk: Chunk, source: int, twin: SourceTensor, twin_source: int, buffers: ThreadBuffers
) -> None:
    """Holds one chunk of a tensor against its twin.

    Args:
        chunk: of the tensor that is to be dropped.
        source: descriptor of its file.
        twin: what it should equal.
        twin_source: descriptor of the twin's file.
        buffers: of the calling thread.

    Raises:
        TwinsDifferError: they differ.
    """
    header = chunk.tensor.source.header
    if (header.dtype, header.shape) != (twin.header.dtype, twin.header.shape):
        raise TwinsDifferError(chunk.tensor.source.name)
    own = read_chunk(source, chunk, buffers.get("in", chunk.nbytes))
    other = buffers.get("twin", chunk.nbytes)
    place = twin.header.offset + chunk.start * own.itemsize
    read_range(twin_source, other, place, chunk.tensor)
    if not np.array_equal(own.view(np.uint8), other):
        raise TwinsDifferError(chunk.tensor.source.name)
