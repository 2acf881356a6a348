"""The border to huggingface_hub: its calls made quiet, patient, and tried again."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import urlsplit

from nf4_pipeline.errors import HubError, PipelineError
from nf4_pipeline.hub import limits, publisher, replies
from nf4_pipeline.hub.errors import (
    Request,
    may_pass,
    translate_error,
    was_refused,
    without_secrets,
)
from nf4_pipeline.hub.limits import Allowance
from nf4_pipeline.hub.remote import RemoteFile, RemoteModel
from nf4_pipeline.printable import printable

T = TypeVar("T")

LIBRARY = "nf4-pipeline"  # what the Hub reads in the user agent

DELAYS: Final = (0.5, 1.0, 2.0, 4.0)
"""Seconds between tries: enough for a blip; an outage is for the user to wait out."""

ONCE_MORE: Final = (1.0,)
"""For calls that the client itself tries six times, in 23 s."""

_LONGEST_DELAY = 30  # seconds, however long a Retry-After asks for


class StoppedTransfer(BaseException):
    """Another file failed, or the user interrupted: this one's transfer ends."""


class Gauge(Protocol):
    """Where a download reports its bytes."""

    def restart(self, at: int = 0) -> None:
        """Begins at byte `at`, for the first time or again."""

    def advance(self, amount: int) -> None:
        """Counts bytes; raises StoppedTransfer to end the download."""


def download(
    model: RemoteModel,
    file: RemoteFile,
    gauge: Gauge,
    sleep: Callable[[float], None],
    *,
    force: bool = False,
) -> None:
    """Lets the client put one file into the cache; with `force`, in the place of the one there.

    Raises:
        HubError: the Hub refused the request, or the last of several tries failed.
        ResourceError: the disk of the cache is full.
    """
    from huggingface_hub import hf_hub_download

    def once() -> str:
        return hf_hub_download(
            model.repo_id,
            file.path,
            revision=model.commit,
            force_download=force,
            tqdm_class=_bar_class(gauge),
            library_name=LIBRARY,
        )

    revision = model.revision or model.commit
    allowance = limits.for_file(file.size, file.sha256 or file.git_sha1, model.commit)
    attempt(
        once,
        Request(model.repo_id, revision, f"downloading {file.path}"),
        sleep,
        allowance=allowance,
    )


def _bar_class(gauge: Gauge) -> Any:
    """Makes what the client takes for a tqdm class: shows nothing, passes bytes on to `gauge`."""

    class Bar:
        def __init__(self, *_: object, initial: int = 0, **__: object) -> None:
            gauge.restart(initial)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, n: float | None = 1) -> None:
            gauge.advance(int(n or 0))

        def _ignore(self, *_: object, **__: object) -> None:
            pass

        # Xet: with `update_transfer` the client counts written bytes by `update` and those on the
        # wire here; without it, both by `update`.
        close = refresh = update_transfer = set_postfix_str = set_transfer_postfix_str = _ignore

    return Bar


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the client's log lines and warnings off the terminal: what matters is raised."""
    from huggingface_hub.utils import logging as client_logging

    logger = client_logging.get_logger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _install(request: Request) -> None:
    """Puts the guard around the client's session, which the client makes for it.

    Raises:
        HubError: the environment is one in which the client can make none.
    """
    from huggingface_hub import constants

    if not re.match(r"https?://[^/\s]", constants.ENDPOINT):
        shown = without_secrets(constants.ENDPOINT, None)[:200]
        host = re.sub(r"^(https?:)?/*", "", shown) or "huggingface.co"
        raise HubError(
            printable(
                f"HF_ENDPOINT is {shown!r}, and a Hub's address begins with https://. Set it to "
                f"https://{host}, or unset it."
            )
        )
    try:
        urlsplit(constants.ENDPOINT).port  # noqa: B018  # older clients only look when they ask
        from nf4_pipeline.hub import transport

        transport.install()
    except Exception as error:  # of a proxy's address, of a file of certificates
        said = " ".join(str(error).split()) or type(error).__name__
        raise HubError(
            printable(
                f"{request.doing}: the Hub client cannot begin in this environment: {said[:300]}. "
                "It reads HF_ENDPOINT, HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and "
                "SSL_CERT_DIR: correct the one that is wrong, or unset it."
            )
        ) from None


def attempt(
    call: Callable[[], T],
    request: Request,
    sleep: Callable[[float], None],
    *,
    delays: Sequence[float] = DELAYS,
    passing: Callable[[BaseException], bool] = may_pass,
    allowance: Allowance | None = None,
) -> T:
    """Makes a call of the client, again after each of `delays` seconds if the fault may pass.

    `allowance` is what all its tries together may take; by default, what a look-up needs.

    Raises:
        HubError: the Hub refused the request, the last of several tries failed, it sent what no Hub
            sends, or the environment is one in which no request can be made.
        ResourceError: the disk of the cache is full.
    """
    _install(request)
    allowance = allowance or limits.for_replies()
    token = _token_of_job(request, sleep)
    pauses = iter((*delays, None))
    while True:
        try:
            allowance.again()
            with limits.allowed(allowance):
                return call()
        except PipelineError:
            raise
        # Whatever the client does with an answer that it did not expect ends here, in words.
        except Exception as error:
            if token is not None and was_refused(error):
                # It may have come to its end on the way: another one, if CI gives one, goes on.
                fresh = _token_of_job(request, sleep)
                if fresh != token:
                    token = fresh
                    continue
            delay = next(pauses)
            if delay is None or not passing(error):
                # The cause's text may hold a token.
                raise translate_error(error, request) from None
            headers = getattr(getattr(error, "response", None), "headers", {})
            asked = replies.number(headers.get("retry-after"), _LONGEST_DELAY)
            sleep(max(delay, float(asked or 0)))


def _token_of_job(request: Request, sleep: Callable[[float], None]) -> str | None:
    """The token that this CI job's identity is exchanged for, asked for anew when it is due.

    None where another token, or none, is used. Asked before each call, so that what it takes counts
    to no other; a call that goes on longer than the token lets the client ask by itself.

    Raises:
        HubError: there is no identity, its issuer does not answer, or the Hub does not take it.
    """
    if publisher.resource() is None:
        return None
    from huggingface_hub import get_token

    for delay in (*DELAYS[:2], None):
        try:
            with limits.allowed(limits.for_token()):
                return get_token()
        except Exception as error:
            if delay is None or not may_pass(error):
                raise translate_error(error, request) from None
            sleep(delay)
    raise AssertionError("the last try returns or raises")
