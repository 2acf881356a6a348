"""The headers of weights that are still on the Hub: what they hold, for a few kilobytes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import sleep as wait
from typing import Final

from nf4_pipeline.checkpoint.safetensors_header import MAX_HEADER_BYTES
from nf4_pipeline.hub import client, limits
from nf4_pipeline.hub.errors import Request
from nf4_pipeline.hub.remote import RemoteFile, RemoteModel
from nf4_pipeline.hub.replies import ReplyError

_WORKERS: Final = 4
_FIRST: Final = 128 << 10  # bytes asked for at first: more than the header of almost any shard
_LENGTH: Final = 8  # bytes before a header, which say how long it is


def fetch_headers(
    model: RemoteModel,
    files: Sequence[RemoteFile],
    *,
    sleep: Callable[[float], None] = wait,
) -> dict[str, bytes]:
    """The first bytes of safetensors files, their headers complete, by path.

    Nothing has checked these bytes against a hash: they are for looking ahead. A file that does not
    begin like safetensors gives whatever it begins with.

    Args:
        model: from `resolve`; its Hub is asked.
        files: weights of it.
        sleep: waits between tries, in seconds.

    Raises:
        HubError: the Hub refuses a file, does not answer, or sends what no Hub sends.
    """

    def header(file: RemoteFile) -> bytes:
        start = _first_bytes(model, file, _FIRST, sleep)
        whole = _LENGTH + _header_bytes(start)
        return start if whole <= _FIRST else _first_bytes(model, file, whole, sleep)

    with client.quiet(), ThreadPoolExecutor(_WORKERS) as pool:
        found = list(pool.map(header, files))
    return {file.path: start for file, start in zip(files, found, strict=True)}


def _header_bytes(start: bytes) -> int:
    """How long the header is by its own word, as far as that can be true."""
    if len(start) < _LENGTH:
        return 0
    length: int = struct.unpack("<Q", start[:_LENGTH])[0]
    return length if length <= MAX_HEADER_BYTES else 0


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


def _read(model: RemoteModel, file: RemoteFile, wanted: int) -> bytes:
    """Reads so many bytes, whether the Hub sends only them or begins to send the file."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its public names
        build_hf_headers,
        hf_raise_for_status,
    )

    url = hf_hub_url(model.repo_id, file.path, revision=model.commit)
    headers = build_hf_headers(library_name=client.LIBRARY) | {"range": f"bytes=0-{wanted - 1}"}
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        hf_raise_for_status(response)
        came = bytearray()
        for chunk in response.iter_raw():
            came += chunk
            if len(came) >= wanted:
                return bytes(came[:wanted])
    raise ReplyError(f"sent {len(came):,} of {wanted:,} bytes", passing=True)
