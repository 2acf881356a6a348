"""One output file: complete or absent, written at known places by any thread, hashed on the way.

The parts of a tensor come in nearly the order of its bytes. Its front is where the first byte is
missing: up to there a thread of the file's own hashes the file, from its first byte on, and one of
the threads that write hashes the tensor. The file's bytes are read back for it, so its hash is of
what other programs will see; a tensor's come from the processor's cache where they can, which is
half as fast again.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from nf4_pipeline.checkpoint.atomic import replacing, start_writing_out, write_at
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.checkpoint.layout import FileLayout, StoredTensor
from nf4_pipeline.checkpoint.safetensors_header import HeaderTensor
from nf4_pipeline.checkpoint.sink import WrittenFile

_HASH_WINDOW: Final = 16 * 2**20


class _Tensor:
    """How far a tensor is.

    Attributes:
        place: where it stands in the file.
        front: bytes that are written without a gap, from its beginning on.
        hashed: bytes that are in `digest`.
        digest: of what is hashed so far.
        hashing: a thread is at it.
    """

    def __init__(self, place: HeaderTensor) -> None:
        self.place = place
        self.front = 0
        self.hashed = 0
        self.digest = hashlib.sha256()
        self.hashing = False
        self._ahead: dict[int, int] = {}  # start -> end of parts behind a gap

    def wrote(self, start: int, end: int) -> None:
        """A part is written, anywhere."""
        self._ahead[start] = end
        while self.front in self._ahead:
            self.front = self._ahead.pop(self.front)

    @property
    def complete(self) -> bool:
        return self.front == self.place.nbytes


class TensorFile:
    """An output file that is being written; see `writing`."""

    def __init__(self, descriptor: int, layout: FileLayout) -> None:
        self.finished = False
        self._descriptor = descriptor
        self._layout = layout
        self._tensors = {place.name: _Tensor(place) for place in layout.tensors}
        self._changed = threading.Condition()
        self._abandoned = False
        self._digest: str | None = None
        self._failure: Exception | None = None
        self._written: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        os.ftruncate(descriptor, layout.nbytes)
        write_at(descriptor, memoryview(layout.header()), 0)
        self._threads = [
            threading.Thread(target=self._follow, name="hash file", daemon=True),
            threading.Thread(target=self._write_out, name="write out", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def write(self, name: str, start: int, data: NDArray[Any] | bytes) -> None:
        """Writes bytes of one tensor, `start` bytes after its beginning; each byte once.

        Safe from any thread. The call may also hash the tensor as far as it is written.
        """
        view = memoryview(data if isinstance(data, bytes) else data.data).cast("B")
        tensor = self._tensors[name]
        place, end = tensor.place, start + view.nbytes
        if end > place.nbytes:
            raise ValueError(f"{name}: {end} bytes do not fit {place.nbytes}")
        if view.nbytes == 0:
            return
        write_at(self._descriptor, view, place.offset + start)
        self._written.put((place.offset + start, view.nbytes))
        with self._changed:
            tensor.wrote(start, end)
            self._changed.notify()
            if tensor.hashing:
                return
            tensor.hashing = True
        if tensor.hashed == start:
            tensor.digest.update(view)
            tensor.hashed = end
        self._hash_tensor(tensor)

    def wants(self, tensors: Sequence[StoredTensor]) -> bool:
        """True if any of these tensors is not written yet."""
        with self._changed:
            return not all(self._tensors[tensor.name].complete for tensor in tensors)

    def finish(self) -> WrittenFile:
        """Waits for the hashes, once every tensor is written."""
        missing = [name for name, tensor in self._tensors.items() if not tensor.complete]
        if missing:
            raise RuntimeError(f"{len(missing)} tensors were not written, such as {min(missing)}")
        self._join()
        if self._failure is not None:
            raise self._failure
        if self._digest is None:
            raise RuntimeError("the file was abandoned before it was finished")
        if any(tensor.hashed != tensor.place.nbytes for tensor in self._tensors.values()):
            raise RuntimeError("a tensor was not hashed to its end: a call of `write` failed")
        self.finished = True
        digest = FileDigest(self._layout.nbytes, self._digest)
        hashes = {name: tensor.digest.hexdigest() for name, tensor in self._tensors.items()}
        return WrittenFile(digest, self._layout.tensors, hashes)

    def abandon(self) -> None:
        """Stops hashing; the file will not be kept."""
        with self._changed:
            self._abandoned = True
            self._changed.notify()
        self._join()

    def _join(self) -> None:
        self._written.put(None)
        for thread in self._threads:
            thread.join()

    def _write_out(self) -> None:
        """Has the system write while others compute, since fsync would begin with all of it.

        In a thread of its own: the call waits where the disk has more than it can take.
        """
        while (part := self._written.get()) is not None and not self._abandoned:
            start_writing_out(self._descriptor, *part)

    def _follow(self) -> None:
        try:
            self._hash_file()
        except Exception as error:  # raised again by `finish`, in the thread that waits
            self._failure = error

    def _hash_file(self) -> None:
        whole = hashlib.sha256()
        self._hash_range(0, self._layout.data_start, whole)
        for tensor in self._tensors.values():
            hashed = 0
            while hashed < tensor.place.nbytes:
                with self._changed:
                    while tensor.front == hashed and not self._abandoned:
                        self._changed.wait()
                    front = tensor.front
                if self._abandoned:
                    return
                self._hash_range(tensor.place.offset + hashed, front - hashed, whole)
                hashed = front
        self._digest = whole.hexdigest()

    def _hash_tensor(self, tensor: _Tensor) -> None:
        """Hashes a tensor to its front, wherever that is by then; one thread at a time."""
        while True:
            with self._changed:
                start, front = tensor.hashed, tensor.front
                if start == front or self._abandoned:
                    tensor.hashing = False
                    return
            self._hash_range(tensor.place.offset + start, front - start, tensor.digest)
            tensor.hashed = front

    def _hash_range(self, offset: int, nbytes: int, digest: Any) -> None:
        """Hashes bytes of the file through a small window that is mapped into memory.

        One long update per window, and no reading calls: each return to Python may wait for other
        threads, which at small steps made hashing ten times slower than it is.
        """
        end = offset + nbytes
        while offset < end and not self._abandoned:
            base = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            count = min(_HASH_WINDOW, end - offset)
            with mmap.mmap(
                self._descriptor, offset - base + count, prot=mmap.PROT_READ, offset=base
            ) as window:
                with memoryview(window)[offset - base :] as view:
                    digest.update(view)
            offset += count


@contextmanager
def writing(path: Path, layout: FileLayout) -> Iterator[TensorFile]:
    """Opens an output file; when the body ends well, the whole file stands at `path`.

    The body must call `TensorFile.finish`.
    """
    with replacing(path) as descriptor:
        file = TensorFile(descriptor, layout)
        try:
            yield file
            if not file.finished:
                raise RuntimeError(f"{path}: the file was left unfinished")
        finally:
            file.abandon()
