"""The one place that every request of the Hub client passes, and every answer before it.

The client's session gets a transport around its own. While a call of `client.attempt` runs

- the token goes to the origin of HF_ENDPOINT and to no other, whoever named the address; what CI
  gave to ask for an id token goes to the issuer that CI named
- redirects, links, ETags, commits and sizes are those of a Hub, or the call ends
- JSON is read whole, within limits, and made again of what is used of it (`replies`)
- bytes, seconds and requests are counted (`limits`), encoded bodies are refused or limited

What else this process asks of a Hub passes untouched. Imported only with the client itself.
"""

from __future__ import annotations

import os
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

from huggingface_hub import constants, get_session, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http

from nf4_pipeline.hub import limits, publisher, replies, xet
from nf4_pipeline.hub.errors import keep_out
from nf4_pipeline.hub.limits import Allowance, PacedBackend
from nf4_pipeline.hub.replies import ReplyError, shown
from nf4_pipeline.printable import printable

# httpx up to 1.x of the client, httpx2 since.
_LIBRARY: Any = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]

_SECRETS: Final = ("authorization", "cookie", "proxy-authorization")
_DROPPED: Final = ("set-cookie", "x-hf-warning", "ratelimit", "ratelimit-policy", "alt-svc")
_ETAGS: Final = ("x-linked-etag", "etag")
_READ_ONLY: Final = ("GET", "HEAD")
_MOST_HEADERS: Final = 200
_MOST_PIECES: Final = 10_000
_SMALLEST_PIECE: Final = 1_024  # bytes, on average, beyond those: each costs some 20 µs
_INFLATED_AT_A_TIME: Final = 1 << 20  # bytes

_one_by_one = threading.Lock()


def install() -> None:
    """Puts the guard around the session of the client, and a limit on its silences."""

    def guarded(make: Callable[[], Any]) -> Callable[[], Any]:
        def factory() -> Any:
            session = make()
            hooks = session.event_hooks
            session.event_hooks = {**hooks, "request": [*hooks["request"], _limit_silence]}
            # The library takes transports when a session is made, which the user's factory does.
            session._transport = _Guard(session._transport)
            session._mounts = {
                pattern: _Guard(inner) if inner is not None else None
                for pattern, inner in session._mounts.items()
            }
            return session

        return factory

    with _one_by_one:
        if _limit_silence not in get_session().event_hooks["request"]:
            # There is no public way to ask for the factory that is set; it may be the user's own.
            set_client_factory(guarded(_http._GLOBAL_CLIENT_FACTORY))
        xet.install()


_SILENCE = 6  # times HF_HUB_DOWNLOAD_TIMEOUT, a minute by default: then nobody answers any more


def _limit_silence(request: Any) -> None:
    """Called by the HTTP library with each request; some ask for no timeout at all by name."""
    limit = _SILENCE * constants.HF_HUB_DOWNLOAD_TIMEOUT
    asked = request.extensions.get("timeout", {})
    timeouts = {phase: asked.get(phase) or limit for phase in ("connect", "read", "write", "pool")}
    request.extensions = {**request.extensions, "timeout": timeouts}


def endpoint() -> replies.Origin:
    """Where the Hub of HF_ENDPOINT is; a user in it is for the Hub alone."""
    url = _LIBRARY.URL(constants.ENDPOINT)
    return _origin(url)


def _origin(url: Any) -> replies.Origin:
    host = f"[{url.host}]" if ":" in url.host else url.host
    port = url.port or (443 if url.scheme == "https" else 80)
    return replies.Origin(url.scheme, host.lower(), port)


class _Guard:
    """A transport around another."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        pool: Any = getattr(inner, "_pool", None)
        if hasattr(pool, "_network_backend"):  # not of a transport that is the user's own
            pool._network_backend = PacedBackend(pool._network_backend)

    def __enter__(self) -> _Guard:
        self._inner.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._inner.__exit__(*details)

    def close(self) -> None:
        self._inner.close()

    def handle_request(self, request: Any) -> Any:
        allowance = limits.current()
        if allowance is None:
            return self._inner.handle_request(request)
        try:
            return self._handle(request, allowance)
        except ReplyError as error:
            error.address = str(request.url)
            raise

    def _handle(self, request: Any, allowance: Allowance) -> Any:
        allowance.ask()
        home = endpoint()
        _bind(request, home)
        with limits.headers():
            response = self._inner.handle_request(request)
        try:
            return _Answer(request, response, allowance, home).checked()
        except BaseException:
            response.stream.close()
            raise


def _bind(request: Any, home: replies.Origin) -> None:
    """Keeps what is secret from all but the Hub itself.

    Raises:
        ReplyError: something that is asked with the token is asked of somebody else.
    """
    # Nothing needs to be smaller on its way, and what is sent shall be what is counted.
    request.headers["accept-encoding"] = "identity"
    keep_out(request.headers.get("authorization", "").partition(" ")[2])
    if _is_for_issuer(request):
        request.headers.pop("cookie", None)
        return
    if _origin(request.url) == home:
        return
    if request.url.userinfo:
        raise ReplyError(f"named an address with a user in it, at {_origin(request.url)}")
    replies.check_target(str(request.url), home)
    if "authorization" in request.headers and request.method not in _READ_ONLY:
        raise ReplyError(f"named {_origin(request.url)} to be asked with the token")
    for name in _SECRETS:
        request.headers.pop(name, None)


def _is_for_issuer(request: Any) -> bool:
    """Whether CI's issuer is asked for an id token, with the token that CI gave for that alone."""
    given = os.environ.get(publisher.REQUEST_TOKEN)
    return (
        bool(given)
        and request.method == "GET"
        and publisher.is_issuer(str(request.url))
        and request.headers.get("authorization") == f"Bearer {given}"
    )


class _Answer:
    """One answer, on its way to the client."""

    def __init__(
        self, request: Any, response: Any, allowance: Allowance, home: replies.Origin
    ) -> None:
        self._request, self._response, self._allowance = request, response, allowance
        self._stream = response.stream
        self._home = home
        self._is_own = _origin(request.url) == home
        root = _LIBRARY.URL(constants.ENDPOINT).path.rstrip("/")
        path = request.url.raw_path.partition(b"?")[0].decode("ascii")
        self._below = path.removeprefix(root) if self._is_own else ""
        self._is_issuers = _is_for_issuer(request)
        is_token = (
            "/xet-read-token/" in self._below
            or self._is_issuers
            or (request.method == "POST" and self._below == publisher.EXCHANGE)
        )
        self._is_file = (
            allowance.file_size is not None and request.method in _READ_ONLY and not is_token
        )

    def checked(self) -> Any:
        """The answer, if the client may see it.

        Raises:
            ReplyError: the answer breaks a rule of the protocol or a limit; the text says which.
        """
        headers, status = self._response.headers, self._response.status_code
        if len(headers) > _MOST_HEADERS:
            raise ReplyError(f"sent {len(headers)} headers")
        for name in _DROPPED:
            headers.pop(name, None)
        self._limit_wait()
        self._check_words()
        self._check_redirect()
        self._check_xet()
        if self._is_file:
            self._check_file()
        if status >= 400:
            return self._refusal()
        if self._request.method == "HEAD":
            headers.pop("content-encoding", None)
            return self._response
        return self._file() if self._is_file else self._reply()

    # Headers.

    def _limit_wait(self) -> None:
        headers = self._response.headers
        asked = replies.number(headers.pop("retry-after", None), 1 << 30)
        wait = self._allowance.wait(asked)
        if wait is not None:
            headers["retry-after"] = str(wait)

    def _check_words(self) -> None:
        headers = self._response.headers
        if (message := headers.pop("x-error-message", None)) is not None:
            headers["x-error-message"] = _ascii(printable(message))
        code = headers.get("x-error-code", "")
        if not (code.isascii() and code.isalpha() and len(code) <= 64):
            headers.pop("x-error-code", None)

    def _check_redirect(self) -> None:
        headers = self._response.headers
        location = headers.get("location")
        if location is None or not 300 <= self._response.status_code < 400:
            headers.pop("location", None)
            return
        try:
            if not (location.isascii() and location.isprintable()):
                raise ValueError(location)
            target = str(self._request.url.join(location))
        except Exception:  # whatever the library's own parser finds
            raise ReplyError(f"led to {shown(location)}, which is no address") from None
        if self._is_issuers:
            raise ReplyError(f"led to {shown(location)} for an id token")
        where = replies.check_target(target, self._home)
        if self._is_own and not self._is_file and where != self._home:
            raise ReplyError(f"led to {where} for an answer of its own")
        headers["location"] = target

    def _check_xet(self) -> None:
        """Whether Xet's facts name what they should; the client would send the token there."""
        headers, links = self._response.headers, self._links()
        headers.pop("link", None)
        if "next" in links:
            replies.own_address(links["next"], self._home)
        kept = {name: links[name] for name in ("next", "xet-auth") if name in links}
        route = links.get("xet-auth") or headers.get("x-xet-refresh-route")
        if "x-xet-hash" in headers:
            if not replies.SHA256.fullmatch(headers["x-xet-hash"]):
                raise ReplyError(f"sent {shown(headers['x-xet-hash'])} as the hash of a Xet file")
            if route is not None:
                replies.own_address(route, self._home)
        if store := headers.get("x-xet-cas-url"):
            xet.check_store(store, self._home)
        if kept:
            headers["link"] = ", ".join(f'<{url}>; rel="{name}"' for name, url in kept.items())

    def _links(self) -> dict[str, str]:
        text = self._response.headers.get("link", "")
        if not text:
            return {}
        try:
            found = _LIBRARY.Response(200, headers={"link": text}).links
        except Exception:
            raise ReplyError(f"sent links that are none: {shown(text)}") from None
        return {name: link["url"] for name, link in found.items() if name and "url" in link}

    def _check_file(self) -> None:
        headers, allowance = self._response.headers, self._allowance
        is_redirect = "location" in headers
        commit = headers.get("x-repo-commit")
        if commit is not None and replies.check_commit(commit) != allowance.commit:
            raise ReplyError(f"answered for commit {commit}, asked for {allowance.commit}")
        for name in _ETAGS:
            if name in headers:
                self._check_etag(name, is_redirect)
        size = allowance.file_size
        announced = headers.get("x-linked-size")
        if announced is not None and replies.number(announced, 1 << 60) != size:
            raise ReplyError(f"listed {size:,} bytes, and announces {shown(announced)}")
        span = headers.get("content-range")
        if span is not None:
            _, _, total = span.rpartition("/")
            if replies.number(total, 1 << 60) != size and self._response.status_code < 400:
                raise ReplyError(f"listed {size:,} bytes, and sends {shown(span)}")
            if replies.number(total, 1 << 60) is None:
                headers.pop("content-range")

    def _check_etag(self, name: str, is_redirect: bool) -> None:
        headers, allowance = self._response.headers, self._allowance
        if self._request.method != "HEAD":
            headers.pop(name)  # a store's own, which the client does not read
            return
        linked = name == "x-linked-etag"
        if not linked and "x-linked-etag" in headers:
            headers.pop(name)  # the client does not read it
            return
        if not linked and is_redirect and not replies.is_etag(headers[name]):
            headers.pop(name)  # of the redirect itself
            return
        found = replies.check_etag(headers[name])
        if allowance.etag is not None and found != allowance.etag:
            raise ReplyError(f"listed the hash {allowance.etag}, and sends the ETag {found}")

    # Bodies.

    def _refusal(self) -> Any:
        """An error with its words alone; a body that cannot be had is no reason for another."""
        if self._request.method == "HEAD":
            self._response.headers.pop("content-encoding", None)
            return self._response
        kind = self._response.headers.get("content-type", "")
        body = self._body(limits.LARGEST_FAULT)
        return self._again(replies.written(replies.fault(body, kind)))

    def _reply(self) -> Any:
        body = self._body(limits.LARGEST_REPLY)
        if 300 <= self._response.status_code:
            return self._again(b"")
        if self._is_issuers:
            found = replies.id_token(replies.parsed(body, is_secret=True))
            keep_out(found["value"])
            return self._again(replies.written(found))
        if not self._is_own:
            return self._again(b"")
        root = constants.ENDPOINT.rstrip("/")
        made = replies.read(self._request.method, self._below, body, self._home, root)
        self._check_page()
        return self._again(made)

    def _check_page(self) -> None:
        """Whether a listing goes on: its next page is none that was there."""
        url = self._links().get("next")
        if url is None:
            return
        if url in self._allowance.pages or url == str(self._request.url):
            raise ReplyError("named a page of its listing twice")
        self._allowance.pages.add(url)

    def _again(self, body: bytes) -> Any:
        headers = self._response.headers.copy()
        for name in ("content-encoding", "content-length", "transfer-encoding"):
            headers.pop(name, None)
        if body:
            headers["content-type"] = "application/json"
        return _LIBRARY.Response(
            self._response.status_code,
            headers=headers,
            content=body,
            request=self._request,
            extensions=self._response.extensions,
        )

    def _body(self, most: int) -> bytes:
        """All of it, decoded.

        Raises:
            ReplyError: the body is larger than that, or encoded in a way that nobody asked for.
        """
        coding = self._response.headers.get("content-encoding", "").strip().lower()
        body = bytearray()
        for chunk in _decoded(self._chunks(), coding):
            body += chunk
            if len(body) > most:
                raise ReplyError(f"answered with more than {most:,} bytes")
        self._stream.close()
        return bytes(body)

    def _file(self) -> Any:
        headers, size = self._response.headers, cast(int, self._allowance.file_size)
        coding = headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            raise ReplyError(f"sent a file in an encoding that was not asked for, {shown(coding)}")
        headers.pop("content-encoding", None)
        announced = replies.number(headers.get("content-length"), 1 << 60)
        if announced is not None and announced > size and "location" not in headers:
            raise ReplyError(f"listed {size:,} bytes, and announces {announced:,}")
        self._response.stream = _stream(self._chunks(size), self._stream.close)
        return self._response

    def _chunks(self, size: int | None = None) -> Iterator[bytes]:
        """The body as it comes, up to `size` bytes."""
        came = pieces = 0
        most = sys.maxsize if size is None else size
        try:
            for chunk in self._stream:
                came += len(chunk)
                pieces += 1
                if came > most:
                    raise ReplyError(f"listed {most:,} bytes, and sends more")
                if pieces > _MOST_PIECES + came // _SMALLEST_PIECE:
                    raise ReplyError(f"cut {came:,} bytes into {pieces:,} pieces")
                yield chunk
        except _LIBRARY.HTTPError:
            self._allowance.broke_off()
            raise


def _decoded(chunks: Iterator[bytes], coding: str) -> Iterator[bytes]:
    """The bytes, a little at a time, so that a bomb is seen before it is there."""
    if coding in ("", "identity"):
        yield from chunks
        return
    if coding not in ("gzip", "x-gzip"):
        raise ReplyError(f"answered in an encoding that was not asked for, {shown(coding)}")
    decoder = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        for chunk in chunks:
            data = chunk
            while data and not decoder.eof:
                yield decoder.decompress(data, _INFLATED_AT_A_TIME)
                data = decoder.unconsumed_tail
        yield decoder.flush(_INFLATED_AT_A_TIME)
    except zlib.error:
        raise ReplyError("answered with what is no gzip", passing=True) from None


def _stream(chunks: Iterator[bytes], close: Callable[[], None]) -> Any:
    """A body for the library, which asks for a class of its own."""

    def iterate(_: Any) -> Iterator[bytes]:
        return chunks

    parts = {"__iter__": iterate, "close": lambda _: close()}
    return type("LimitedStream", (_LIBRARY.SyncByteStream,), parts)()


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode("ascii")
