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
from nf4_pipeline.hub import client, limits
from nf4_pipeline.hub.errors import Request
from nf4_pipeline.hub.remote import RemoteFile, RemoteModel
from nf4_pipeline.hub.replies import ReplyError

_WORKERS: Final = 4
_NO_RANGES: Final = 416  # status of a server that sends no parts of a file
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
    revision = model.revision or model.commit
    return client.attempt(
        lambda: _read(model, file, wanted) if wanted else b"",
        Request(model.repo_id, revision, f"reading the header of {file.path}"),
        sleep,
        allowance=limits.for_file(file.size, file.sha256 or file.git_sha1, model.commit),
    )


def _read(model: RemoteModel, file: RemoteFile, wanted: int, *, ranged: bool = True) -> bytes:
    """Reads so many bytes, whether the Hub sends only them or begins to send the file."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its public names
        build_hf_headers,
        hf_raise_for_status,
    )

    url = hf_hub_url(model.repo_id, file.path, revision=model.commit)
    headers = build_hf_headers(library_name=client.LIBRARY)
    if ranged:
        headers["range"] = f"bytes=0-{wanted - 1}"
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        if ranged and response.status_code == _NO_RANGES:
            return _read(model, file, wanted, ranged=False)
        hf_raise_for_status(response)
        came = bytearray()
        for chunk in response.iter_raw():
            came += chunk
            if len(came) >= wanted:
                return bytes(came[:wanted])
    raise ReplyError(f"sent {len(came):,} of {wanted:,} bytes", passing=True)
