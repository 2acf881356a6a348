"""What takes the bytes of an output file: a file on disk (writer.py), or hashes alone."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

from numpy.typing import NDArray

from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.checkpoint.layout import FileLayout, StoredTensor
from nf4_pipeline.checkpoint.safetensors_header import HeaderTensor

HELD_BYTES: Final = 128 * 2**20
"""What a `HashingSink` holds back at most: bytes that came before their turn. Enough for a chunk of
each of thirty threads."""


@dataclass(frozen=True)
class WrittenFile:
    """What is known of an output file.

    Attributes:
        digest: of the whole file.
        tensors: in the order of their bytes.
        sha256: of each tensor's bytes, by name.
    """

    digest: FileDigest
    tensors: tuple[HeaderTensor, ...]
    sha256: dict[str, str]


class Sink(Protocol):
    """Takes the tensors of one output file, in parts, from any thread."""

    def write(self, name: str, start: int, data: NDArray[Any] | bytes) -> None:
        """Takes bytes of one tensor, `start` bytes after its beginning."""

    def wants(self, tensors: Sequence[StoredTensor]) -> bool:
        """True if any of these tensors has bytes that are still to come, or to come again."""

    def finish(self) -> WrittenFile:
        """What is known of the file, once nothing is wanted any more."""


class HashingSink:
    """Hashes a file that is never written, from its first byte to its last.

    Parts come in nearly the order of the file, since they are made in it. What comes early is held
    back until its turn. What does not fit there is let go, and asked for again (`wants`): that
    happens to tensors of an awkward length, which stand at the end of a file but are made before.

    Args:
        layout: of the file.
        held_bytes: what is held back at most.
    """

    def __init__(self, layout: FileLayout, held_bytes: int = HELD_BYTES) -> None:
        self._layout = layout
        self._room = held_bytes
        self._places = {tensor.name: tensor for tensor in layout.tensors}
        self._held: dict[int, bytes] = {}  # by offset in the file
        self._whole = hashlib.sha256(layout.header())
        self._position = layout.data_start
        self._tensors = self._in_turn()
        self._sha256: dict[str, str] = {}
        self._lock = threading.Lock()
        self._next_tensor()

    def write(self, name: str, start: int, data: NDArray[Any] | bytes) -> None:
        """Hashes a part whose turn it is, and holds back one that comes early."""
        view = memoryview(data if isinstance(data, bytes) else data.data).cast("B")
        offset = self._places[name].offset + start
        with self._lock:
            if offset == self._position:
                self._hash(view)
                while (held := self._held.pop(self._position, None)) is not None:
                    self._room += len(held)
                    self._hash(memoryview(held))
            elif offset > self._position and offset not in self._held and view.nbytes <= self._room:
                self._held[offset] = bytes(view)
                self._room -= view.nbytes

    def wants(self, tensors: Sequence[StoredTensor]) -> bool:
        """True if the last byte of any of these tensors was not hashed yet."""
        return any(tensor.name not in self._sha256 for tensor in tensors)

    def finish(self) -> WrittenFile:
        """The hashes."""
        if self._position != self._layout.nbytes:
            raise RuntimeError(f"hashed {self._position} of {self._layout.nbytes} bytes")
        digest = FileDigest(self._layout.nbytes, self._whole.hexdigest())
        return WrittenFile(digest, self._layout.tensors, dict(self._sha256))

    def _hash(self, view: memoryview) -> None:
        """Hashes bytes at the position; a part never reaches beyond its tensor."""
        self._whole.update(view)
        self._one.update(view)
        self._position += view.nbytes
        if view.nbytes and self._position == self._end:
            self._sha256[self._name] = self._one.hexdigest()
            self._next_tensor()

    def _in_turn(self) -> Iterator[HeaderTensor]:
        for tensor in self._layout.tensors:
            if tensor.nbytes:
                yield tensor
            else:
                self._sha256[tensor.name] = hashlib.sha256().hexdigest()

    def _next_tensor(self) -> None:
        tensor = next(self._tensors, None)
        self._one = hashlib.sha256()
        if tensor is not None:
            self._name, self._end = tensor.name, tensor.offset + tensor.nbytes


@contextmanager
def hashing(layout: FileLayout) -> Iterator[HashingSink]:
    """A sink that hashes, for whoever opens sinks in turn."""
    yield HashingSink(layout)
