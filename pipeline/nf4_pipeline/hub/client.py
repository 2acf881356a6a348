"""The border to huggingface_hub: its calls made quiet, patient, and tried again."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeVar

from nf4_pipeline.hub.errors import Request, failures, may_pass, translate_error
from nf4_pipeline.hub.remote import RemoteModel

T = TypeVar("T")

LIBRARY = "nf4-pipeline"  # what the Hub reads in the user agent

DELAYS: Final = (0.5, 1.0, 2.0, 4.0)
"""Seconds between tries: enough for a blip; an outage is for the user to wait out."""

ONCE_MORE: Final = (1.0,)
"""For calls that the client itself tries six times, in 23 s."""

_LONGEST_DELAY = 30.0  # seconds, however long a Retry-After asks for
_ONE_BY_ONE = threading.Lock()
_SILENCE = 6  # times HF_HUB_DOWNLOAD_TIMEOUT, a minute by default: then nobody answers any more


class Gauge(Protocol):
    """Where a download reports its bytes."""

    def restart(self, at: int = 0) -> None:
        """Begins at byte `at`, for the first time or again."""

    def advance(self, amount: int) -> None:
        """Counts bytes; raises to end the download."""


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
        HubError: the Hub refused the request, or the last of several tries failed.
        ResourceError: the disk of the cache is full.
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


def end_silences() -> None:
    """Gives the requests of the client a timeout where they have none.

    By itself the client waits for ever for the answer to a listing, an upload or a commit.
    """
    from huggingface_hub import get_session, set_client_factory
    from huggingface_hub.utils import _http

    def limited(make: Callable[[], Any]) -> Callable[[], Any]:
        def factory() -> Any:
            session = make()
            hooks = session.event_hooks
            session.event_hooks = {**hooks, "request": [*hooks["request"], _limit_silence]}
            return session

        return factory

    with _ONE_BY_ONE:
        if _limit_silence not in get_session().event_hooks["request"]:
            # There is no public way to ask for the factory that is set; it may be the user's own.
            set_client_factory(limited(_http._GLOBAL_CLIENT_FACTORY))


def _limit_silence(request: Any) -> None:
    """Called by the HTTP library with each request; some ask for no timeout at all by name."""
    from huggingface_hub import constants

    limit = _SILENCE * constants.HF_HUB_DOWNLOAD_TIMEOUT
    asked = request.extensions.get("timeout", {})
    limits = {phase: asked.get(phase) or limit for phase in ("connect", "read", "write", "pool")}
    request.extensions = {**request.extensions, "timeout": limits}


def attempt(
    call: Callable[[], T],
    request: Request,
    sleep: Callable[[float], None],
    *,
    delays: Sequence[float] = DELAYS,
    passing: Callable[[BaseException], bool] = may_pass,
) -> T:
    """Makes a call of the client, again after each of `delays` seconds if the fault may pass.

    Raises:
        HubError: the Hub refused the request, or the last of several tries failed.
        ResourceError: the disk of the cache is full.
    """
    end_silences()
    for delay in (*delays, None):
        try:
            return call()
        except failures() as error:
            if delay is None or not passing(error):
                # The cause's text may hold a token.
                raise translate_error(error, request) from None
            asked = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
            sleep(min(max(delay, float(asked) if asked.isdigit() else 0.0), _LONGEST_DELAY))
    raise AssertionError("the last try returns or raises")
