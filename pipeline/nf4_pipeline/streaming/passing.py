"""A file of weights that passes by: fetched in stretches, hashed in their order, read, not kept."""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.checkpoint.safetensors_header import HeaderTensor
from nf4_pipeline.progress import Reporter, Task
from nf4_pipeline.streaming.stretches import LARGEST, Fetch, PassedFile, Stretch, cut, fetch_right

AHEAD: Final = 12 * LARGEST
"""Bytes that are here, or on their way, beside those that a reader waits for."""

_AT_A_TIME: Final = 6  # requests

Span = tuple[int, int]
"""Where bytes of a file begin, and where they end."""


class Passing:
    """A file, or parts of it, passing by; a context manager, whose end ends what is on its way.

    Bytes are here from when they came until all that is wanted of their stretch was read. They come
    in the order of the file. Whoever reads should do so in that order, too: it waits, and all that
    is before the bytes that it waits for comes first, however much that is.

    Args:
        file: its name.
        spans: of its stretches, in their order.
        wanted: bytes that will be read, each of them once.
        fetch: from the Hub.
        reporter: told how many bytes came, of all that will come.
        sha256: what each stretch must hash to; None if it is not known yet.
        header: what the file should begin with.
        named: tensors that are hashed by themselves.
    """

    def __init__(
        self,
        file: str,
        spans: Sequence[Span],
        wanted: Iterable[Span],
        fetch: Fetch,
        reporter: Reporter,
        *,
        sha256: Sequence[str] | None = None,
        header: bytes = b"",
        named: Iterable[HeaderTensor] = (),
    ) -> None:
        self._file, self._spans, self._fetch, self._reporter = file, spans, fetch, reporter
        self._expected, self._header = sha256, header
        self._named = {tensor.name: (tensor, hashlib.sha256()) for tensor in named}
        self._starts = [start for start, _ in spans]
        self._left = self._count(wanted)  # bytes of each stretch that are still to be read
        self._here: dict[int, bytes] = {}
        self._held = 0  # bytes that are here or on their way
        self._asked = -1  # the last stretch that somebody waits for
        self._hashed = 0  # bytes, from the beginning
        self._as_planned = True
        self._failure: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._whole = hashlib.sha256()
        self._hashes: list[str] = []
        self._task: Task
        self._open = ExitStack()
        self._pool = ThreadPoolExecutor(_AT_A_TIME, "fetch")
        self._thread = threading.Thread(target=self._follow, name="hash source", daemon=True)

    @classmethod
    def whole(
        cls,
        file: str,
        size: int,
        header: bytes,
        tensors: Sequence[HeaderTensor],
        wanted: Iterable[Span],
        fetch: Fetch,
        reporter: Reporter,
        named: Iterable[HeaderTensor] = (),
    ) -> Passing:
        """All of a file of which nothing is known but its header; `finish` says what it was.

        Args:
            file: its name.
            size: of all of it.
            header: the bytes before those of tensors.
            tensors: that it holds, in the order of their bytes. A file may hold others, too, for
                which another file's count.
            wanted: as for the class, like `fetch`, `reporter` and `named`.
        """
        spans = _pieces(0, len(header))
        for start, end in [*cut(tensors), (size, size)]:
            spans += _pieces(spans[-1][1] if spans else 0, start)
            spans += [(start, end)] if start < end else []
        return cls(file, spans, wanted, fetch, reporter, header=header, named=named)

    @classmethod
    def known(
        cls,
        file: str,
        passed: PassedFile,
        wanted: Sequence[Span],
        fetch: Fetch,
        reporter: Reporter,
    ) -> Passing:
        """Those stretches of a file that was here that hold what is wanted, by their hashes."""
        needed = [
            stretch
            for stretch in passed.stretches
            if any(start < stretch.end and stretch.start < end for start, end in wanted)
        ]
        spans = [(stretch.start, stretch.end) for stretch in needed]
        hashes = [stretch.sha256 for stretch in needed]
        return cls(file, spans, wanted, fetch, reporter, sha256=hashes)

    @property
    def nbytes(self) -> int:
        """Of all that will come."""
        return sum(end - start for start, end in self._spans)

    def __enter__(self) -> Passing:
        self._task = self._open.enter_context(self._reporter.task("stream source", self.nbytes))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._pool.shutdown(cancel_futures=True)
        self._thread.join()
        self._open.__exit__(kind, error, trace)

    def begins_as_planned(self) -> bool:
        """Whether the file begins with the header that the work was planned by; waits for it.

        Raises:
            HubError: the Hub does not give it.
        """
        with self._changed:
            while self._hashed < len(self._header) and self._failure is None:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure
        return self._as_planned

    def read(self, view: NDArray[np.uint8], offset: int, tensor: object) -> None:
        """Fills `view` with the file's bytes from `offset` on, once they have come.

        Args:
            view: as long as what is wanted.
            offset: in the file.
            tensor: which they are of; makes no difference.

        Raises:
            HubError: the Hub does not give them, or gave other bytes than it did before.
        """
        done, index = 0, bisect_right(self._starts, offset) - 1
        while done < view.size:
            start, end = self._spans[index]
            data = self._wait(index)
            first = offset + done - start
            count = min(end - start - first, view.size - done)
            view[done : done + count] = np.frombuffer(data, np.uint8, count, first)
            self._gave(index, count)
            done, index = done + count, index + 1

    def will_read(self, chunk: object, offset: int | None = None) -> None:
        """Nothing: all of it is on its way."""

    def finish(self) -> PassedFile:
        """What came, to the end of the file; nothing is read any more.

        Raises:
            HubError: the Hub does not give all of it.
        """
        with self._changed:
            self._left = [0] * len(self._spans)
            for index in list(self._here):
                self._drop(index)
            self._changed.notify_all()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return PassedFile(
            size=self._hashed,
            sha256=self._whole.hexdigest(),
            stretches=tuple(
                Stretch(start=start, end=end, sha256=sha256)
                for (start, end), sha256 in zip(self._spans, self._hashes, strict=True)
                if start >= len(self._header)
            ),
            tensors=self._tensors(),
        )

    def _tensors(self) -> Mapping[str, str]:
        return {name: sha256.hexdigest() for name, (_, sha256) in self._named.items()}

    def _count(self, wanted: Iterable[Span]) -> list[int]:
        left = [0] * len(self._spans)
        for first, last in wanted:
            index = max(0, bisect_right(self._starts, first) - 1)
            while index < len(self._spans) and self._spans[index][0] < last:
                start, end = self._spans[index]
                left[index] += max(0, min(end, last) - max(start, first))
                index += 1
        return left

    def _wait(self, index: int) -> bytes:
        with self._changed:
            self._asked = max(self._asked, index)
            self._changed.notify_all()
            while index not in self._here:
                if self._failure is not None:
                    raise self._failure
                if self._stopped:
                    raise InterruptedError
                self._changed.wait()
            return self._here[index]

    def _gave(self, index: int, count: int) -> None:
        with self._changed:
            self._left[index] -= count
            if self._left[index] <= 0 and index in self._here:
                self._drop(index)
                self._changed.notify_all()

    def _drop(self, index: int) -> None:
        self._held -= len(self._here.pop(index))

    def _follow(self) -> None:
        """Has stretches fetched ahead, and takes them in their order."""
        try:
            coming: deque[Future[tuple[bytes, str]]] = deque()
            begun = 0
            for index in range(len(self._spans)):
                with self._changed:
                    while True:
                        while begun < len(self._spans) and self._may_begin(begun):
                            start, end = self._spans[begun]
                            self._held += end - start
                            coming.append(self._pool.submit(self._fetch_one, begun))
                            begun += 1
                        if coming or self._stopped:
                            break
                        self._changed.wait()
                    if self._stopped:
                        return
                data, sha256 = coming.popleft().result()
                self._take(index, data, sha256)
        except BaseException as error:
            with self._changed:
                if not self._stopped:  # else nobody waits
                    self._failure = error
                self._changed.notify_all()

    def _may_begin(self, index: int) -> bool:
        start, end = self._spans[index]
        return index <= self._asked or self._held == 0 or self._held + end - start <= AHEAD

    def _fetch_one(self, index: int) -> tuple[bytes, str]:
        start, end = self._spans[index]
        if self._expected is not None:
            stretch = Stretch(start=start, end=end, sha256=self._expected[index])
            return fetch_right(self._fetch, self._file, stretch), stretch.sha256
        data = self._fetch(self._file, start, end)
        return data, hashlib.sha256(data).hexdigest()

    def _take(self, index: int, data: bytes, sha256: str) -> None:
        start, end = self._spans[index]
        if self._expected is None:
            self._whole.update(data)
            for tensor, found in self._named.values():
                first = max(start, tensor.offset)
                last = min(end, tensor.offset + tensor.nbytes)
                if first < last:
                    found.update(memoryview(data)[first - start : last - start])
        self._task.advance(len(data))
        with self._changed:
            self._hashes.append(sha256)
            if start < len(self._header) and data != self._header[start:end]:
                self._as_planned = False
            self._hashed += len(data)
            if self._left[index] > 0:
                self._here[index] = data
            else:
                self._held -= len(data)
            self._changed.notify_all()


def _pieces(start: int, end: int) -> list[Span]:
    return [(at, min(at + LARGEST, end)) for at in range(start, end, LARGEST)]
