"""How much one call may take from a Hub: bytes, time in proportion to them, and requests.

A silence has a limit of its own (`client`). This is about what never ends though it is never
silent: a byte a second, pages without end, a file that grows, a transfer that breaks off for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from nf4_pipeline.hub.replies import ReplyError

LARGEST_REPLY: Final = 16 << 20  # bytes of one page of JSON; the largest that are known have two MB
LARGEST_FAULT: Final = 1 << 20  # bytes of what comes with a refusal
_GRACE = 15.0  # seconds of transfer that any call may take
_PATIENCE = 120.0  # seconds that a call may wait in all, the silences between its bytes included
_REQUESTS = 40  # of one call: what the client makes of a fault that stays
_PER_REQUEST = 16 << 10  # bytes after which one more is fair, as in a listing of many pages
_BREAKS = 10  # transfers that end before their end
_PER_BREAK = 256 << 10  # bytes after which one more is fair
_LONGEST_WAIT = 30  # seconds, however long a Hub asks to wait


@dataclass
class Allowance:
    """What one call may take, its tries together, and what it took.

    Attributes:
        rate: bytes a second that have to come, or go, on average.
        most: bytes that may come in all; None for any number, as long as they are fast enough.
        patience: seconds that it may wait in all.
        file_size: bytes of the file that is fetched; None if none is.
        etag: the hash of that file; None if it has none.
        commit: the one that it is of.
    """

    rate: float
    most: int | None
    patience: float = _PATIENCE
    file_size: int | None = None
    etag: str | None = None
    commit: str | None = None
    pages: set[str] = field(default_factory=set)
    _moved: int = 0
    _received: int = 0
    _transfer: float = 0.0
    _waited: float = 0.0
    _requests: int = 0
    _breaks: int = 0
    _asked_to_wait: int = 0

    def again(self) -> None:
        """Begins another try: a listing may name the same pages."""
        self.pages.clear()

    def ask(self) -> None:
        """Counts a request.

        Raises:
            ReplyError: the call asked too often, or too many answers broke off or fell silent.
        """
        self._requests += 1
        if self._requests > _REQUESTS + self._moved // _PER_REQUEST:
            raise ReplyError(f"asked for more than {self._requests - 1:,} requests in one call")
        if self._breaks > _BREAKS + self._moved // _PER_BREAK:
            raise ReplyError(f"broke off {self._breaks:,} answers of one call")
        self._check_patience()

    def broke_off(self) -> None:
        """Counts an answer that ended before its end."""
        self._breaks += 1

    def waited(self, seconds: float) -> None:
        """Counts a time in which nothing moved."""
        self._waited += seconds

    def moved(self, amount: int, seconds: float, *, received: bool) -> None:
        """Counts bytes that came or went, and the time that it took.

        Raises:
            ReplyError: the bytes come too slowly, or more came than the call may take.
        """
        self._moved += amount
        self._received += amount if received else 0
        self._transfer += seconds
        self._waited += seconds
        if self._transfer > _GRACE + self._moved / self.rate:
            raise ReplyError(f"took {self._transfer:.0f} seconds for {self._moved:,} bytes")
        if self.most is not None and self._received > self.most:
            raise ReplyError(f"sent more than {self.most:,} bytes in one call")
        self._check_patience()

    def _check_patience(self) -> None:
        if self._waited > self.patience + self._moved / self.rate:
            raise ReplyError(f"let one call wait for {self._waited:.0f} seconds")

    def wait(self, seconds: int | None) -> int | None:
        """How long the client shall wait that was asked to; None for its own pace."""
        if seconds is None or self._asked_to_wait >= _LONGEST_WAIT:
            return None
        taken = min(seconds, _LONGEST_WAIT)
        self._asked_to_wait += taken
        return taken


def for_replies() -> Allowance:
    """For look-ups: JSON, in pages."""
    return Allowance(rate=256 << 10, most=4 * LARGEST_REPLY)


def for_token() -> Allowance:
    """For the exchange of a CI job's identity: two small answers."""
    return Allowance(rate=8 << 10, most=1 << 20, patience=_PATIENCE / 2)


def for_file(size: int, etag: str | None, commit: str) -> Allowance:
    """For one file of `size` bytes: three tries from its front, and what comes around them."""
    most = 3 * size + (8 << 20)
    return Allowance(rate=8 << 10, most=most, file_size=size, etag=etag, commit=commit)


def for_upload() -> Allowance:
    """For what goes to a Hub; what comes is small, but a large commit takes its time."""
    return Allowance(rate=8 << 10, most=4 * LARGEST_REPLY, patience=2.5 * _PATIENCE)


_LARGEST_HEAD = 512 << 10  # bytes before the body of an answer, what was read of that included


@contextmanager
def headers() -> Iterator[None]:
    """Limits what this thread reads before an answer has its headers: they may be without end."""
    _own.head = 0
    try:
        yield
    finally:
        _own.head = None


def _count_head(amount: int) -> None:
    head = getattr(_own, "head", None)
    if head is None:
        return
    _own.head = head + amount
    if _own.head > _LARGEST_HEAD:
        raise ReplyError(f"sent more than {_LARGEST_HEAD:,} bytes of headers")


_own = threading.local()
_running: list[Allowance] = []


@contextmanager
def allowed(allowance: Allowance) -> Iterator[None]:
    """Lets what this thread asks of a Hub count; what threads of the client ask does, too."""
    before = getattr(_own, "allowance", None)
    _own.allowance = allowance
    _running.append(allowance)
    try:
        yield
    finally:
        _own.allowance = before
        _running[:] = [other for other in _running if other is not allowance]


def current() -> Allowance | None:
    """What a request of this thread counts to; None if it is nobody's here."""
    own: Allowance | None = getattr(_own, "allowance", None)
    return own or next(reversed(_running), None)


class PacedBackend:
    """In the place of the HTTP library's network: counts bytes and seconds of every transfer."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def connect_tcp(self, *args: Any, **options: Any) -> Any:
        began = time.monotonic()
        try:
            return PacedStream(self._inner.connect_tcp(*args, **options))
        finally:
            if allowance := current():
                allowance.waited(time.monotonic() - began)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class PacedStream:
    """One connection."""

    _PIECE = 16 << 10  # bytes sent between two looks at the clock

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._is_asked = False  # the answer is being worked on: that is a silence, and no transfer

    def read(self, max_bytes: int, timeout: float | None = None) -> Any:
        allowance = current()
        if allowance is None:
            return self._inner.read(max_bytes, timeout=timeout)
        began = time.monotonic()
        data = b""
        try:
            data = self._inner.read(max_bytes, timeout=timeout)
        finally:
            seconds = time.monotonic() - began
            if self._is_asked or not data:
                allowance.waited(seconds)
                seconds = 0.0
        self._is_asked = False
        allowance.moved(len(data), seconds, received=True)
        _count_head(len(data))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        allowance = current()
        self._is_asked = True
        if allowance is None:
            self._inner.write(buffer, timeout=timeout)
            return
        view = memoryview(buffer)
        for start in range(0, len(view), self._PIECE):
            piece = view[start : start + self._PIECE]
            began = time.monotonic()
            self._inner.write(piece, timeout=timeout)
            allowance.moved(len(piece), time.monotonic() - began, received=False)

    def start_tls(self, *args: Any, **options: Any) -> PacedStream:
        began = time.monotonic()
        try:
            return PacedStream(self._inner.start_tls(*args, **options))
        finally:
            if allowance := current():
                allowance.waited(time.monotonic() - began)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
