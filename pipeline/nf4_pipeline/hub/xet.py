"""Xet: a second client, in Rust, that the Hub's own starts, and that asks the network by itself.

No transport can be put around it. So what it is told is checked before it starts: the store that
the Hub names is one of the network (hf_xet takes `local://` and a folder, too), and the address
that gets the token is the Hub's own.
"""

from __future__ import annotations

import os
from typing import Any, Final

from nf4_pipeline.hub import limits, replies
from nf4_pipeline.hub.replies import ReplyError, shown

SCHEMES: Final = ["https", "http"]
"""Of stores. Tests add "local", for a store in a folder."""


def check_store(address: str, home: replies.Origin) -> None:
    """Whether a Hub may name this as the store of its Xet files.

    Raises:
        ReplyError: the store is no address of the network, or one that `replies.check_target`
            refuses.
    """
    scheme = address.partition("://")[0]
    if scheme not in SCHEMES:
        raise ReplyError(f"named {shown(address)} as the store of its files")
    if scheme in ("https", "http"):
        replies.check_target(address, home)


def keep_no_chunks() -> None:
    """Tells hf_xet, before it starts, to keep no copy of what it fetches: some builds keep 10 GB.

    Where the user has said how much, that holds.
    """
    os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")


def install() -> None:
    """Lets each upload ask for its store by the guarded session, before hf_xet starts.

    For a download the client does so itself; for an upload hf_xet would take what the Hub says.
    """
    from huggingface_hub.utils import _xet

    original = getattr(_xet, "get_xet_session", None)
    if original is None or isinstance(original, _Sessions):
        return
    _xet.get_xet_session = _Sessions(original)


class _Sessions:
    """In the place of the client's `get_xet_session`."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __call__(self) -> Any:
        return _Session(self._original())


class _Session:
    """A session of hf_xet whose uploads know their store."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def new_upload_commit(self, **options: Any) -> Any:
        from huggingface_hub.utils import _xet

        if limits.current() is not None and "endpoint" not in options:
            info = _xet._fetch_xet_connection_info_with_url(
                options["token_refresh_url"], options["token_refresh_headers"]
            )
            options |= {
                "endpoint": info.endpoint,
                "token": info.access_token,
                "token_expiry_unix_secs": info.expiration_unix_epoch,
            }
        return self._inner.new_upload_commit(**options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
