"""The border to huggingface_hub: its calls made quiet, tried again, its errors put into words."""

from __future__ import annotations

import errno
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pipeline.errors import HubError, PipelineError, ResourceError
from pipeline.hub import cache
from pipeline.hub.remote import RemoteModel

T = TypeVar("T")

LIBRARY = "nf4-pipeline"  # what the Hub reads in the user agent

_DELAYS = (0.5, 1.0, 2.0, 4.0)  # seconds between tries: a blip passes, an outage shows within 8 s
_LONGEST_DELAY = 30.0  # seconds, however long a Retry-After asks for
# Names, because the client's HTTP library is httpx up to 1.x and httpx2 since; RuntimeError is what
# its transfer library for Xet repos raises.
_PASSING = {
    "ConnectionError",
    "NetworkError",
    "RemoteProtocolError",
    "RuntimeError",
    "TimeoutException",
}
_NO_ANSWER = {"ConnectionError", "TransportError"}


class Gauge(Protocol):
    """Where a download reports its bytes."""

    def restart(self, at: int = 0) -> None:
        """Begins at byte `at`, for the first time or again."""

    def advance(self, amount: int) -> None:
        """Counts bytes; raises to end the download."""


@dataclass(frozen=True)
class Request:
    """What a call is about, for its messages: "{doing}: …"."""

    repo_id: str
    revision: str
    doing: str


def download(
    model: RemoteModel,
    path: str,
    gauge: Gauge,
    sleep: Callable[[float], None],
    *,
    force: bool = False,
) -> None:
    """Lets the client put one file into the cache; with `force`, in the place of the one there.

    Raises:
        HubError: the Hub refuses, or several tries failed.
        ResourceError: the disk is full.
    """
    from huggingface_hub import hf_hub_download

    def once() -> str:
        return hf_hub_download(
            model.repo_id,
            path,
            revision=model.commit,
            force_download=force,
            tqdm_class=_bar_class(gauge),
            library_name=LIBRARY,
        )

    revision = model.revision or model.commit
    attempt(once, Request(model.repo_id, revision, f"downloading {path}"), sleep)


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


def attempt(
    call: Callable[[], T],
    request: Request,
    sleep: Callable[[float], None],
    *,
    delays: Sequence[float] = _DELAYS,
) -> T:
    """Makes a call of the client, again after each of `delays` seconds if the fault may pass.

    Raises:
        HubError: the Hub refused, or the last try failed.
        ResourceError: the disk is full.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # The first base is the HTTPError of the client's HTTP library.
    families: tuple[type[Exception], ...] = (
        *HfHubHTTPError.__bases__[:1],
        OSError,
        ValueError,
        RuntimeError,
    )
    for delay in (*delays, None):
        try:
            return call()
        except families as error:
            if delay is None or not _may_pass(error):
                raise _explained(error, request) from None  # the cause's text may hold a token
            asked = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
            sleep(min(max(delay, float(asked) if asked.isdigit() else 0.0), _LONGEST_DELAY))
    raise AssertionError("the last try returns or raises")


def _may_pass(error: BaseException) -> bool:
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return False  # the client itself has tried this one for half a minute
    if isinstance(error, ValueError):  # "Force download failed due to the above error."
        return error.__cause__ is not None and _may_pass(error.__cause__)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & _PASSING) or "Consistency check failed" in str(error)


def _explained(error: BaseException, request: Request) -> PipelineError:
    """Says what went wrong and what to do about it, in one message."""
    from huggingface_hub import constants, errors, get_token

    if isinstance(error, errors.LocalEntryNotFoundError | ValueError) and error.__cause__:
        error = error.__cause__
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ResourceError(
            f"{request.doing}: the disk is full. Make room, or set HF_HOME to a larger disk."
        )
    repo_id, revision, endpoint = request.repo_id, request.revision, constants.ENDPOINT
    token = get_token()
    access = "the token that is set has no access to it" if token else "no token is set"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        text = (
            f"{repo_id} is gated, and {access}: accept the licence at {endpoint}/{repo_id} "
            "and set HF_TOKEN to a token of that account."
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = (
            f"{repo_id} was not found at {endpoint}, or it is private and {access}: "
            "check the name, or set HF_TOKEN."
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        text = (
            f"{repo_id} has no revision {revision!r}: "
            f"give a branch, a tag or a commit that {endpoint}/{repo_id} has."
        )
    elif token and not (token.isascii() and token.isprintable()):
        text = f"{request.doing}: HF_TOKEN has characters that no token has: copy it again."
    elif status == 401 and token:
        text = f"{request.doing}: {endpoint} does not accept the token that is set: renew HF_TOKEN."
    elif status == 401:
        text = f"{request.doing}: {endpoint} asks for a token, and none is set: set HF_TOKEN."
    else:
        text = f"{request.doing}: {_fault(error, status, endpoint, token)}. Try again later"
        commit = cache.cached_commit(repo_id, revision)
        text += f"; HF_HUB_OFFLINE=1 uses the cached commit {commit}." if commit else "."
    return HubError(_without_secrets(text, token))


def _fault(error: BaseException, status: int | None, endpoint: str, token: str | None) -> str:
    words = getattr(error, "server_message", None) if status else str(error)
    first = _without_secrets(words or "", token).strip().partition("\n")[0][:200].rstrip(".")
    if status:
        return f"{endpoint} answered {status}" + (f" ({first})" if first else "")
    if "Consistency check failed" in first:
        return f"{endpoint} sent more or fewer bytes than it announced"
    kinds = {kind.__name__ for kind in type(error).__mro__}
    what = f"{endpoint} cannot be reached" if kinds & _NO_ANSWER else "the Hub client failed"
    return f"{what} ({type(error).__name__}{': ' + first if first else ''})"


def _without_secrets(text: str, token: str | None) -> str:
    """Takes tokens, and what addresses carry besides their path, out of a text."""
    if token:
        text = text.replace(token, "***")
    text = re.sub(r"(?<=//)[^/@\s]+@", "", text)
    text = re.sub(r"\bhf_\w{8,}", "***", text)
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", text)
