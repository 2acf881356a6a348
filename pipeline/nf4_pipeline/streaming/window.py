"""Files of the Hub, fetched into a spool, and dropped when they have been worked on."""

from __future__ import annotations

import shutil
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Final

from nf4_pipeline.errors import ResourceError
from nf4_pipeline.hub import cache_at, fetch, snapshot
from nf4_pipeline.hub.client import StoppedTransfer
from nf4_pipeline.hub.remote import RemoteFile, RemoteModel
from nf4_pipeline.hub.xet import keep_no_chunks
from nf4_pipeline.progress import Reporter, SilentReporter, Task
from nf4_pipeline.resource_usage import free_space

AT_A_TIME: Final = 2
"""Files in the spool: one is worked on while the next one comes."""

_TOGETHER: Final = 12 * 10**9
"""Bytes of both, at most; of larger ones, the next comes when the one before it is gone."""


def window_bytes(sizes: Sequence[int]) -> int:
    """The most that files take in the spool at a time.

    Args:
        sizes: of the files, in their order.
    """
    return max([*sizes, *(sum(pair) for pair in pairwise(sizes) if sum(pair) <= _TOGETHER)])


class Window:
    """Fetches files one after the other, each hashed as a download is.

    Args:
        spool: a folder of its own, laid out as the Hub cache is.
        model: the files' repo at one commit.
        reporter: told how much has come.
    """

    def __init__(self, spool: Path, model: RemoteModel, reporter: Reporter) -> None:
        self._spool, self._model, self._reporter = spool, model, reporter

    def files(self, wanted: Sequence[RemoteFile]) -> Generator[tuple[RemoteFile, Path], None, None]:
        """Each file, and where it lies until the next one is asked for.

        To be closed: then what is on its way ends, and the spool is as it would be for the next
        run. A file that an earlier one left there is hashed and not fetched.

        Args:
            wanted: in their order.

        Raises:
            HubError: the Hub refuses a file, does not answer, or sent wrong bytes twice.
            ResourceError: the disk has no room for the next file.
        """
        keep_no_chunks()
        self._drop_others(wanted[:AT_A_TIME])
        total, stop = sum(file.size for file in wanted), threading.Event()
        with (
            cache_at(self._spool),
            self._reporter.task("stream source", total) as task,
            ThreadPoolExecutor(1, "fetch") as pool,
        ):
            watched = _Watched(self._reporter, task, stop)
            coming = deque(wanted)

            def begin() -> Future[Path] | None:
                return pool.submit(self._fetch, coming[0], watched) if coming else None

            try:
                ahead = begin()
                while ahead is not None:
                    path, file = ahead.result(), coming.popleft()
                    fit = bool(coming) and file.size + coming[0].size <= _TOGETHER
                    ahead = begin() if fit else None
                    yield file, path
                    _drop(path)
                    ahead = ahead or begin()
            finally:
                stop.set()
        self._drop_others(())

    def _fetch(self, file: RemoteFile, reporter: Reporter) -> Path:
        path = snapshot(self._model.repo_id, self._model.commit) / file.path
        free = free_space(self._spool)
        if not path.is_file() and file.size > free:
            raise ResourceError(
                f"{self._spool} is on a disk with {free / 1e9:.3f} GB free; {file.path} needs "
                f"{file.size / 1e9:.3f} GB there until it is quantized. Make space, then run the "
                "same command again: what is finished is kept."
            )
        try:
            return fetch(self._model, [file], reporter, last=False).folder / file.path
        except StoppedTransfer:
            raise InterruptedError from None

    def _drop_others(self, kept: Sequence[RemoteFile]) -> None:
        """Deletes what an earlier run left that this one does not begin with."""
        if not kept:
            shutil.rmtree(self._spool, ignore_errors=True)
            return
        names = {file.path for file in kept}
        with cache_at(self._spool):
            folder = snapshot(self._model.repo_id, self._model.commit)
        hashes = {file.sha256 for file in kept}
        for path in folder.glob("*"):
            if path.name not in names:
                path.unlink()
        for blob in (folder.parents[1] / "blobs").glob("*"):
            if blob.name not in hashes:  # of another file, or only a part of one
                blob.unlink()


def _drop(path: Path) -> None:
    """Takes a file and its bytes out of the spool, which nobody else uses.

    A repo may have two files of the same bytes, which lie there once.
    """
    blob = path.resolve()
    path.unlink(missing_ok=True)
    if not any(other.resolve() == blob for other in path.parent.glob("*")):
        blob.unlink(missing_ok=True)


class _Watched(SilentReporter):
    """Shows what has come as one task; ends a transfer that nobody waits for any more."""

    def __init__(self, reporter: Reporter, shown: Task, stop: threading.Event) -> None:
        self._reporter, self._shown, self._stop = reporter, shown, stop

    @contextmanager
    def task(self, title: str, total: int | None, *, unit: str = "bytes") -> Iterator[Task]:
        yield _Stoppable(self._shown if title == "download" else None, self._stop)

    def note(self, text: str) -> None:
        self._reporter.note(text)


class _Stoppable:
    def __init__(self, shown: Task | None, stop: threading.Event) -> None:
        self._shown, self._stop = shown, stop

    def advance(self, amount: int) -> None:
        if self._stop.is_set():
            raise StoppedTransfer
        if self._shown is not None:
            self._shown.advance(amount)
