"""Where each tensor of an output file will stand, known before any byte is written.

Only the quant-state texts have a length that depends on the weights (the digits of one number).
They stand at the end, and the header is given the room it would need at their longest; so every
other tensor has its final place from the start and can be written by any thread at any time.
Tensors are ordered by element size, largest first, then by name: everything stays aligned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.checkpoint.header import DTYPE_BYTES, HeaderTensor, header_bytes
from pipeline.nf4.layout import QUANT_STATE_SLACK, QUANT_STATE_SUFFIX, StoredTensor


@dataclass(frozen=True)
class FileLayout:
    """The plan of one safetensors file.

    Attributes:
        data_start: bytes before the first tensor, header included.
        placed: tensors with final places, in the order of their bytes.
        texts: the quant states, which follow them, at their longest.
    """

    data_start: int
    placed: tuple[HeaderTensor, ...]
    texts: tuple[StoredTensor, ...]

    @property
    def max_bytes(self) -> int:
        """The size of the file if every text has its greatest length."""
        return self._texts_start + sum(text.nbytes for text in self.texts)

    @property
    def slack_bytes(self) -> int:
        """By how much the file may end up smaller than `max_bytes`, at most."""
        return QUANT_STATE_SLACK * len(self.texts)

    @property
    def _texts_start(self) -> int:
        last = self.placed[-1] if self.placed else None
        return last.offset + last.nbytes if last else self.data_start

    def place(self, name: str) -> HeaderTensor:
        """Where the tensor of this name goes."""
        return self._by_name()[name]

    def _by_name(self) -> Mapping[str, HeaderTensor]:
        return {tensor.name: tensor for tensor in self.placed}

    def finish(self, texts: Mapping[str, bytes]) -> tuple[HeaderTensor, ...]:
        """All tensors of the file, now that the texts are known."""
        position = self._texts_start
        done = list(self.placed)
        for text in self.texts:
            nbytes = len(texts[text.name])
            done.append(HeaderTensor(text.name, text.dtype, (nbytes,), position, nbytes))
            position += nbytes
        return tuple(done)


def plan_layout(tensors: Iterable[StoredTensor]) -> FileLayout:
    """Gives every tensor of a file its place."""
    ordered = sorted(tensors, key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name))
    texts = tuple(t for t in ordered if t.name.endswith(QUANT_STATE_SUFFIX))
    fixed = [t for t in ordered if not t.name.endswith(QUANT_STATE_SUFFIX)]
    # Offsets are relative to the data section, so the header's length does not depend on itself.
    relative = _place([*fixed, *texts], start=0)
    data_start = _round_up(len(header_bytes_unpadded(relative)), 64)
    placed = tuple(replace(t, offset=t.offset + data_start) for t in relative[: len(fixed)])
    return FileLayout(data_start, placed, texts)


def header_bytes_unpadded(relative: Sequence[HeaderTensor]) -> bytes:
    """The header of tensors whose offsets count from the data section, without padding."""
    room = 8 + 256 + sum(len(t.name.encode()) * 6 + 256 for t in relative)
    shifted = [replace(t, offset=t.offset + room) for t in relative]
    return header_bytes(shifted, room).rstrip(b" ")


def _place(tensors: Sequence[StoredTensor], start: int) -> list[HeaderTensor]:
    placed = []
    for tensor in tensors:
        placed.append(HeaderTensor(tensor.name, tensor.dtype, tensor.shape, start, tensor.nbytes))
        start += tensor.nbytes
    return placed


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
