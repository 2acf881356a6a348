"""A part of a file that is on the Hub, without the rest of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from nf4_pipeline.hub import client, limits
from nf4_pipeline.hub.errors import Request
from nf4_pipeline.hub.remote import RemoteFile, RemoteModel
from nf4_pipeline.hub.replies import ReplyError

_NO_RANGES: Final = 416  # status of a server that sends no parts of a file
_PARTIAL: Final = 206


def read_range(
    model: RemoteModel,
    file: RemoteFile,
    start: int,
    end: int,
    doing: str,
    sleep: Callable[[float], None],
) -> bytes:
    """Bytes of a file, which nothing has checked against a hash.

    Args:
        model: from `resolve`.
        file: of it.
        start: where they begin.
        end: where they end; behind `start`.
        doing: what they are wanted for, for messages.
        sleep: waits between tries, in seconds.

    Raises:
        HubError: the Hub refuses the file, does not answer, or sends what no Hub sends.
    """
    return client.attempt(
        lambda: _read(model, file, start, end),
        Request(model.repo_id, model.revision or model.commit, doing),
        sleep,
        allowance=limits.for_file(file.size, file.sha256 or file.git_sha1, model.commit),
    )


def _read(
    model: RemoteModel, file: RemoteFile, start: int, end: int, *, ranged: bool = True
) -> bytes:
    """Reads so many bytes, whether the Hub sends only them or, from 0 on, begins with the file."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its public names
        build_hf_headers,
        hf_raise_for_status,
    )

    url = hf_hub_url(model.repo_id, file.path, revision=model.commit)
    headers = build_hf_headers(library_name=client.LIBRARY)
    if ranged:
        headers["range"] = f"bytes={start}-{end - 1}"
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        if ranged and not start and response.status_code == _NO_RANGES:
            return _read(model, file, start, end, ranged=False)
        hf_raise_for_status(response)
        if start and response.status_code != _PARTIAL:
            raise ReplyError("sent all of a file instead of a part of it")
        came = bytearray()
        for chunk in response.iter_raw():
            came += chunk
            if len(came) >= end - start:
                return bytes(came[: end - start])
    raise ReplyError(f"sent {len(came):,} of {end - start:,} bytes", passing=True)
