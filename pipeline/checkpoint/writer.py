"""One output file: complete or absent, written at known places by any thread, hashed on the way.

A thread follows the front of what is written and hashes the file from its first byte; each tensor
is hashed by the thread that completes it. Both read the bytes back, so what is hashed is what other
programs will see.
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

from pipeline.checkpoint.digest import FileDigest
from pipeline.checkpoint.durable import replacing, start_writing_out
from pipeline.checkpoint.layout import FileLayout
from pipeline.checkpoint.sink import WrittenFile
from pipeline.nf4.layout import StoredTensor

_HASH_WINDOW: Final = 16 * 2**20


class TensorFile:
    """An output file that is being written; see `writing`."""

    def __init__(self, descriptor: int, layout: FileLayout) -> None:
        self.finished = False
        self._descriptor = descriptor
        self._layout = layout
        self._places = {tensor.name: tensor for tensor in layout.tensors}
        self._left = {tensor.name: tensor.nbytes for tensor in layout.tensors}
        self._complete = {t.name for t in layout.tensors if t.nbytes == 0}
        self._sha256 = {name: hashlib.sha256().hexdigest() for name in self._complete}
        self._changed = threading.Condition()
        self._abandoned = False
        self._digest: str | None = None
        self._failure: Exception | None = None
        self._written: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        os.ftruncate(descriptor, layout.nbytes)
        self._pwrite(memoryview(layout.header()), 0)
        self._threads = [
            threading.Thread(target=self._follow, name="hash file", daemon=True),
            threading.Thread(target=self._write_out, name="write out", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def write(self, name: str, start: int, data: NDArray[Any] | bytes) -> None:
        """Writes bytes of one tensor, `start` bytes after its beginning; each byte once.

        Safe from any thread. The call that completes a tensor also hashes it.
        """
        view = memoryview(data if isinstance(data, bytes) else data.data).cast("B")
        place = self._places[name]
        if start + view.nbytes > place.nbytes:
            raise ValueError(f"{name}: {start + view.nbytes} bytes do not fit {place.nbytes}")
        self._pwrite(view, place.offset + start)
        self._written.put((place.offset + start, view.nbytes))
        with self._changed:
            self._left[name] -= view.nbytes
            if self._left[name] > 0 or view.nbytes == 0:
                return
            self._complete.add(name)
            self._changed.notify_all()
        digest = hashlib.sha256()
        self._hash_range(place.offset, place.nbytes, digest)
        with self._changed:
            self._sha256[name] = digest.hexdigest()

    def wants(self, tensors: Sequence[StoredTensor]) -> bool:
        """True if any of these tensors is not written yet."""
        with self._changed:
            return any(tensor.name not in self._complete for tensor in tensors)

    def finish(self) -> WrittenFile:
        """Waits for the hashes, once every tensor is written."""
        missing = set(self._places) - self._complete
        if missing:
            raise RuntimeError(f"{len(missing)} tensors were not written, such as {min(missing)}")
        self._join()
        if self._failure is not None:
            raise self._failure
        if self._digest is None:
            raise RuntimeError("the file was abandoned before it was finished")
        self.finished = True
        digest = FileDigest(self._layout.nbytes, self._digest)
        return WrittenFile(digest, self._layout.tensors, dict(self._sha256))

    def abandon(self) -> None:
        """Stops hashing; the file will not be kept."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
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
        for tensor in self._layout.tensors:
            with self._changed:
                while tensor.name not in self._complete and not self._abandoned:
                    self._changed.wait()
            if self._abandoned:
                return
            self._hash_range(tensor.offset, tensor.nbytes, whole)
        self._digest = whole.hexdigest()

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

    def _pwrite(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count


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
