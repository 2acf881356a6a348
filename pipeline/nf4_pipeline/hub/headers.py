"""The headers of weights that are still on the Hub: what they hold, for a few kilobytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import sleep as wait
from typing import Final

from nf4_pipeline.checkpoint.safetensors_header import (
    LENGTH_BYTES,
    MAX_HEADERS_BYTES,
    header_length,
)
from nf4_pipeline.hub import client
from nf4_pipeline.hub.ranges import read_range
from nf4_pipeline.hub.remote import RemoteFile, RemoteModel

_WORKERS: Final = 4
_FIRST: Final = 128 << 10  # bytes asked for at first: more than the header of almost any shard
_OF_NO_HEADER: Final = 1 << 10  # bytes; a pointer of Git LFS has fewer


def fetch_headers(
    model: RemoteModel,
    files: Sequence[RemoteFile],
    *,
    sleep: Callable[[float], None] = wait,
) -> dict[str, bytes]:
    """The first bytes of safetensors files, their headers complete, by path.

    Nothing has checked these bytes against a hash: they are for looking ahead. A file that does not
    begin like safetensors gives whatever it begins with; and where all headers together claim to be
    larger than those of any real model, each file gives the beginning of its own alone.

    Args:
        model: from `resolve`; its Hub is asked.
        files: weights of it.
        sleep: waits between tries, in seconds.

    Raises:
        HubError: the Hub refuses a file, does not answer, or sends what no Hub sends.
    """

    def first(file: RemoteFile) -> bytes:
        start = _first_bytes(model, file, _FIRST, sleep)
        return start[: _needed(start)]

    def rest(file: RemoteFile, start: bytes) -> bytes:
        needed = _needed(start)
        return start if needed <= _FIRST else _first_bytes(model, file, needed, sleep)

    with client.quiet(), ThreadPoolExecutor(_WORKERS) as pool:
        found = list(pool.map(first, files))
        if sum(map(header_length, found)) <= MAX_HEADERS_BYTES:
            found = list(pool.map(rest, files, found))
    return {file.path: start for file, start in zip(files, found, strict=True)}


def _needed(start: bytes) -> int:
    """How much of a file its header is; of one that has none, enough to see what it is instead."""
    length = header_length(start)
    return LENGTH_BYTES + length if length else _OF_NO_HEADER


def _first_bytes(
    model: RemoteModel, file: RemoteFile, amount: int, sleep: Callable[[float], None]
) -> bytes:
    wanted = min(amount, file.size)
    doing = f"reading the header of {file.path}"
    return read_range(model, file, 0, wanted, doing, sleep) if wanted else b""
