"""Where each tensor of an output file will stand, known before any byte is written.

So any thread can write any part at any time, and the file can be hashed from the front while its
end is still being computed. Tensors whose length is a multiple of eight bytes come first, in the
order in which they are made; the few others follow, larger elements first. Everything is aligned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from nf4_pipeline.checkpoint.safetensors_header import DTYPE_BYTES, HeaderTensor, header_bytes

_ALIGNMENT = 8  # of the widest element
_DATA_ALIGNMENT = 64


@dataclass(frozen=True)
class StoredTensor:
    """One tensor that a safetensors file will hold: name, dtype as safetensors names it, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class FileLayout:
    """The plan of one safetensors file.

    Attributes:
        data_start: bytes before the first tensor: the header and its length.
        tensors: with their final places, in the order of their bytes.
    """

    data_start: int
    tensors: tuple[HeaderTensor, ...]

    @property
    def nbytes(self) -> int:
        """The exact size of the file."""
        return self.data_start + sum(tensor.nbytes for tensor in self.tensors)

    def header(self) -> bytes:
        """The first `data_start` bytes of the file."""
        return header_bytes(self.tensors, self.data_start)


def plan_layout(tensors: Iterable[StoredTensor]) -> FileLayout:
    """Gives every tensor of a file its place.

    Args:
        tensors: in the order in which they will be made.
    """
    given = list(tensors)
    even = [tensor for tensor in given if tensor.nbytes % _ALIGNMENT == 0]
    odd = [tensor for tensor in given if tensor.nbytes % _ALIGNMENT != 0]
    odd.sort(key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
    # Offsets in a header count from its end, so its length does not depend on itself.
    relative = _place([*even, *odd])
    length = 8 + len(header_bytes(relative, 0))
    data_start = -(-length // _DATA_ALIGNMENT) * _DATA_ALIGNMENT
    placed = tuple(replace(tensor, offset=tensor.offset + data_start) for tensor in relative)
    return FileLayout(data_start, placed)


def _place(tensors: Sequence[StoredTensor]) -> list[HeaderTensor]:
    position = 0
    placed = []
    for tensor in tensors:
        placed.append(
            HeaderTensor(tensor.name, tensor.dtype, tensor.shape, position, tensor.nbytes)
        )
        position += tensor.nbytes
    return placed
