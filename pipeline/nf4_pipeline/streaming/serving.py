"""Stretches of files of the Hub for worker processes, which have neither network nor token."""

from __future__ import annotations

import json
import socketserver
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Final

from nf4_pipeline.errors import PipelineError
from nf4_pipeline.streaming.reading import short
from nf4_pipeline.streaming.stretches import Fetch, PassedFile, Stretch, fetch_right

_AHEAD: Final = 6  # stretches that are fetched at a time
_KEPT: Final = 12  # stretches of which something was not asked for yet


class Stretches:
    """Stretches of files, each fetched once for all that ask for a part of it.

    A stretch goes when all of it has been given away; the oldest one goes when there are too many.

    Args:
        files: by name.
        fetch: from the Hub.
    """

    def __init__(self, files: Mapping[str, PassedFile], fetch: Fetch) -> None:
        self._files, self._fetch = files, fetch
        self._lock = threading.Lock()
        self._room = threading.Semaphore(_AHEAD)
        self._held: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._left: dict[tuple[str, int], int] = {}

    def read(self, file: str, offset: int, size: int) -> Iterator[memoryview]:
        """Bytes of a file, in pieces.

        Args:
            file: its name.
            offset: where they begin.
            size: how many.

        Raises:
            HubError: the Hub refuses, does not answer, or gave other bytes twice.
        """
        end = offset + size
        for stretch in self._files[file].stretches:
            first, last = max(offset, stretch.start), min(end, stretch.end)
            if first < last:
                data = memoryview(self._get(file, stretch))
                yield data[first - stretch.start : last - stretch.start]
                self._gave(file, stretch, last - first)

    def _get(self, file: str, stretch: Stretch) -> bytes:
        key = file, stretch.start
        with self._lock:
            future = self._held.get(key)
            mine = future is None
            if future is None:
                future = self._held[key] = Future()
                self._left[key] = stretch.end - stretch.start
                while len(self._held) > _KEPT:
                    self._forget(next(iter(self._held)))
        if mine:
            try:
                with self._room:
                    future.set_result(fetch_right(self._fetch, file, stretch))
            except BaseException as error:
                with self._lock:
                    self._forget(key)
                future.set_exception(error)
        return future.result()

    def _gave(self, file: str, stretch: Stretch, size: int) -> None:
        key = file, stretch.start
        with self._lock:
            if key in self._left:
                self._left[key] -= size
                if self._left[key] <= 0:
                    self._forget(key)

    def _forget(self, key: tuple[str, int]) -> None:
        self._held.pop(key, None)
        self._left.pop(key, None)


@contextmanager
def serving(stretches: Stretches, path: Path) -> Iterator[None]:
    """Answers at a socket while the body runs.

    Args:
        stretches: what is served.
        path: of the socket, in a folder of this user alone.
    """

    class Answer(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline():
                asked = json.loads(line)
                _answer(self.wfile, stretches, asked["file"], asked["offset"], asked["size"])

    with short(path) as address, _Server(address, Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            path.unlink(missing_ok=True)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A worker that is gone asks for nothing more."""


def _answer(out: BufferedIOBase, stretches: Stretches, file: str, offset: int, size: int) -> None:
    try:
        pieces = list(stretches.read(file, offset, size))
    except PipelineError as error:
        said = {"error": type(error).__name__, "text": str(error)}
        out.write(json.dumps(said).encode() + b"\n")
        return
    out.write(json.dumps({"size": size}).encode() + b"\n")
    for piece in pieces:
        out.write(piece)
    out.flush()
