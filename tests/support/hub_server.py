"""A Hub on 127.0.0.1 for tests: real HTTP, two ports (the Hub and its CDN), and planned faults.

    with HubServer() as hub:
        hub.store.add("org/name", {"config.json": b"{}"})
        hub.faults.append(Fault("*/resolve/*", status=503))
        ...  # HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET=1
        assert hub.count("GET", "*/resolve/*") == 2

It answers what the unmodified client asks for downloads. Uploads are in `hub_uploads`, a module
that decorates handlers with `route`. A handler gets a `Call` and gives an `Answer`, or raises
`Refused`.
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from mmap import mmap
from types import TracebackType
from typing import Any, ClassVar, Final
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.support.hub_store import Blob, Commit, Repo, Store
from tests.support.processes import PATIENCE, eventually

TOKEN: Final = "hf_RecognizableTokenOfTheTests"
REPO = r"(?P<repo>[^/]+/[^/]+|[^/]+)"
REVISION = r"(?P<revision>[^/]+)"


@dataclass
class Fault:
    """Something that goes wrong for the first `times` requests that match.

    `path` is a pattern for the decoded path of the URL, `wanted` one for its Range header, where
    that counts. What can go wrong, alone or together: the
    answer waits `delay` seconds; it is `status` with `headers`; `flip_bit` of its body is flipped;
    the connection ends after `cut_after` bytes of its body, or is reset after `reset_after`; with
    `dropped` it is reset before the request is acted on; a Range header is passed over.

    A request that is answered with a `status` is not acted on, unless it is `applied`. One bit of
    what the client sends is flipped by `flip_sent`.
    """

    path: str
    times: int = 1
    method: str | None = None
    cdn: bool | None = None
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "planned fault"
    cut_after: int | None = None
    reset_after: int | None = None
    flip_bit: int | None = None
    flip_sent: int | None = None
    delay: float = 0.0
    dropped: bool = False
    applied: bool = False
    ignore_range: bool = False
    wanted: str | None = None


@dataclass(frozen=True)
class Call:
    """One request, as a handler sees it; `groups` are those of its route, decoded."""

    hub: HubServer
    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    cdn: bool
    groups: Mapping[str, str]

    @property
    def user(self) -> str | None:
        """Who asks; a token that is not known is refused."""
        bearer = self.headers.get("authorization", "")
        if not bearer:
            return None
        store, token = self.hub.store, bearer.removeprefix("Bearer ")
        user = store.users.get(token)
        if user is None or time.time() >= store.ends.get(token, time.time() + 1):
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return user

    def repo(self, *, files: bool = False) -> Repo:
        """The repo of the path, if the one who asks may see it, or with `files` read it."""
        user = self.user
        repo = self.hub.store.repos.get(self.groups["repo"])
        if repo is None or (repo.private and user not in repo.readers):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if files and repo.gated and user not in repo.readers:
            raise Refused(403 if user else 401, "GatedRepo", f"Access to {repo.repo_id} is gated")
        return repo

    def writer(self) -> str:
        """The name of the one who asks, who must be somebody."""
        user = self.user
        if user is None:
            raise Refused(401, None, "This needs a token")
        return user

    def commit(self, repo: Repo) -> Commit:
        """The commit of the path's revision, main if it names none."""
        revision = self.groups.get("revision", "main")
        commit = repo.find(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


@dataclass(frozen=True)
class Answer:
    """What goes back: JSON if `body` is not bytes."""

    status: int = 200
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    ranges: bool = False  # whether a Range header is obeyed


class Refused(Exception):
    """An answer that says no."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(status, {"error": message}, headers)


@dataclass
class XetStore:
    """A store that Xet clients write to and read from by themselves, without this server.

    Attributes:
        url: of the store; hf_xet takes `local://` and a folder.
        hashes: Xet's hash of each file that may come, by its sha256.
        content: its bytes; what is in the store is for the next reader to find out.
    """

    url: str
    hashes: Mapping[str, str]
    content: Mapping[str, bytes]
    url_in_body: str | None = None  # what hf_xet is told, if that is something else


Handler = Callable[[Call], Answer]
ROUTES: list[tuple[str, bool, re.Pattern[str], Handler]] = []


def route(method: str, pattern: str, *, cdn: bool = False) -> Callable[[Handler], Handler]:
    """Registers a handler; `pattern` matches the whole path, percent-encoded as it came."""

    def register(handler: Handler) -> Handler:
        ROUTES.append((method, cdn, re.compile(pattern), handler))
        return handler

    return register


@dataclass(frozen=True)
class Seen:
    """A request in the log."""

    method: str
    path: str
    cdn: bool
    authorized: bool
    bearer: str = ""
    range: str = ""


class HubServer:
    """Two servers over one store, the log of what they were asked, and the faults still to come."""

    page_size: int = 1000  # entries of a tree listing in one answer
    part_size: int | None = None  # LFS uploads larger than this come in parts of it
    xet: XetStore | None = None  # set, LFS files are also offered by way of Xet
    pause: float = 0.0  # seconds before each request is acted on, and between pieces of a body
    piece: int = 1 << 18  # bytes of a body sent at a time when there is a pause

    def __init__(self) -> None:
        self.store = Store()
        self.faults: list[Fault] = []
        self.unhashed: set[str] = set()  # files that are listed without a hash
        self.seen: list[Seen] = []
        self.bugs: list[BaseException] = []
        self.lock = threading.Lock()
        self.busy = 0  # requests that are acted on or answered
        self.connections = 0
        self._held_from: int | None = None
        self._gate = threading.Event()
        self.after_commit: Callable[[dict[str, bytes | None]], Mapping[str, bytes | None]] = dict
        self._before: list[tuple[str, Callable[[], object]]] = []
        self._servers = [_Server(self, cdn=False), _Server(self, cdn=True)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        if self.bugs and error is None:
            raise self.bugs[0]

    def count(self, method: str, path: str, *, cdn: bool | None = None) -> int:
        """How often something was asked; `path` is a pattern."""
        return sum(
            seen.method == method and fnmatchcase(seen.path, path) and cdn in (None, seen.cdn)
            for seen in self.seen
        )

    def before(self, path: str, act: Callable[[], object]) -> None:
        """Lets something happen once, just before a request to `path` is acted on."""
        self._before.append((path, act))

    def act_before(self, path: str) -> None:
        """Does what `before` planned."""
        with self.lock:
            due = [entry for entry in self._before if fnmatchcase(path, entry[0])][:1]
            for entry in due:
                self._before.remove(entry)
        for _, act in due:
            act()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that a request still under way brings about."""
        assert eventually(condition)

    def settle(self) -> None:
        """Waits until all is done that was asked by clients that are gone."""
        for server in self._servers:  # connections are taken up in the order in which they came
            with socket.create_connection(("127.0.0.1", server.server_port)) as last:
                last.shutdown(socket.SHUT_WR)
                last.recv(1)
        self.wait_until(lambda: self.connections == 0)

    @contextmanager
    def holding(self, number: int) -> Iterator[None]:
        """While the body runs, no request is acted on from that one on, counted in `seen`."""
        self._gate.clear()
        self._held_from = number
        try:
            yield
        finally:
            self._held_from = None
            self._gate.set()

    def hold_back(self, number: int) -> None:
        """Waits with a request of this number as long as it is to be held."""
        if self._held_from is not None and number >= self._held_from:
            self._gate.wait(PATIENCE)

    def next_fault(self, method: str, path: str, *, cdn: bool, wanted: str = "") -> Fault | None:
        """Takes one use of the first fault that matches."""
        with self.lock:
            for fault in self.faults:
                if (
                    fault.times > 0
                    and fnmatchcase(path, fault.path)
                    and (fault.wanted is None or fnmatchcase(wanted, fault.wanted))
                    and fault.method in (None, method)
                    and fault.cdn in (None, cdn)
                ):
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubServer, *, cdn: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.cdn = hub, cdn

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.hub.lock:
            self.hub.connections += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self.hub.lock:
                self.hub.connections -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Lost connections are what these tests are about; anything else was recorded."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are two packets: the second would wait 40 ms for the first's acknowledgement.
    disable_nagle_algorithm = True
    timeout = 300
    server: _Server
    # Sent to those who bring no token, as the real Hub does; the client prints it.
    warning: ClassVar[str] = "auth; You are sending unauthenticated requests to the HF Hub."

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        hub = self.server.hub
        with hub.lock:
            hub.busy += 1
        try:
            self._act()
        finally:
            with hub.lock:
                hub.busy -= 1

    def _act(self) -> None:
        hub, cdn, method = self.server.hub, self.server.cdn, self.command
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self._read_body()
        if body is None:  # whoever sent it died meanwhile
            self.close_connection = True
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        with hub.lock:
            bearer = headers.get("authorization", "")
            wanted = headers.get("range", "")
            hub.seen.append(Seen(method, path, cdn, "authorization" in headers, bearer, wanted))
            number = len(hub.seen)
        hub.hold_back(number)
        fault = hub.next_fault(method, path, cdn=cdn, wanted=wanted) or Fault(path)
        time.sleep(fault.delay + hub.pause)
        if fault.dropped:
            self._reset()
            return
        text = {"X-Error-Message": fault.message, **fault.headers}
        planned = Answer(fault.status or 200, {"error": fault.message}, text)
        if fault.status is not None and not fault.applied:
            self._send(planned, fault)
            return
        if fault.flip_sent is not None and body:
            body = _flipped(body, fault.flip_sent)
        answer = Refused(404, None, f"no such endpoint: {method} {path}").answer
        query = parse_qs(url.query, keep_blank_values=True)
        try:
            hub.act_before(path)
            for verb, side, pattern, handler in ROUTES:
                match = pattern.fullmatch(url.path) if (verb, side) == (method, cdn) else None
                if match:
                    groups = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                    answer = handler(Call(hub, method, path, query, headers, body, cdn, groups))
                    break
        except Refused as refused:
            answer = refused.answer
        except Exception as bug:
            hub.bugs.append(bug)
            answer = Answer(500, {"error": repr(bug)})
        self._send(answer if fault.status is None else planned, fault)

    def _read_body(self) -> bytes | None:
        """The whole body; None if it breaks off."""
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            length = int(self.headers.get("content-length") or 0)
            body = self.rfile.read(length)
            return body if len(body) == length else None
        body = b""
        while line := self.rfile.readline():
            size = int(line.split(b";")[0], 16)
            piece = self.rfile.read(size)
            body += piece
            if len(piece) < size or not self.rfile.readline():
                return None
            if size == 0:
                return body
        return None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _send(self, answer: Answer, fault: Fault) -> None:
        if fault.reset_after is not None and self.command == "HEAD":
            self._reset()  # its answer would be whole with the headers
            return
        status, headers, body = answer.status, dict(answer.headers), answer.body
        if not isinstance(body, bytes | mmap):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if answer.ranges and wanted and status == 200 and not fault.ignore_range:
            first, size = int(wanted[1]), len(body)
            last = min(int(wanted[2]), size - 1) if wanted[2] else size - 1
            if first > last:
                status, body = 416, b""
                headers["Content-Range"] = f"bytes */{size}"
            else:
                status, body = 206, body[first : last + 1]
                headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        if fault.flip_bit is not None:
            body = _flipped(body, fault.flip_bit)
        if not self.headers.get("authorization") and not self.server.cdn:
            headers["X-HF-Warning"] = self.warning
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            ends = [end for end in (fault.cut_after, fault.reset_after) if end is not None]
            self._write(body[: min(ends, default=len(body))])
        if fault.cut_after is not None:
            self.close_connection = True
        if fault.reset_after is not None:
            time.sleep(0.05)  # lets the client read what was sent: a reset throws the rest away
            self._reset()

    def _write(self, body: bytes) -> None:
        hub = self.server.hub
        if not hub.pause:
            self.wfile.write(body)
            return
        for start in range(0, len(body), hub.piece):
            self.wfile.write(body[start : start + hub.piece])
            time.sleep(hub.pause)

    def _reset(self) -> None:
        linger = struct.pack("ii", 1, 0)  # closing sends RST instead of FIN
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        os.close(self.connection.detach())  # before the base class can shut it down in order


def _flipped(body: bytes, bit: int) -> bytes:
    """A copy with one bit changed; counts from the end where there are not that many."""
    changed = bytearray(body)
    changed[bit // 8 % len(changed)] ^= 1 << bit % 8
    return bytes(changed)


@route("HEAD", f"/api/models/{REPO}")
@route("HEAD", f"/api/models/{REPO}/revision/{REVISION}")
@route("GET", f"/api/models/{REPO}")
@route("GET", f"/api/models/{REPO}/revision/{REVISION}")
def model_info(call: Call) -> Answer:
    """A repo's commit and the names of its files; with ?blobs their sizes and hashes too."""
    repo = call.repo()
    commit = call.commit(repo)
    siblings = []
    for path, blob in sorted(commit.files.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if "blobs" in call.query:
            sibling |= {"size": len(blob.data), "blobId": blob.oid}
            if blob.lfs:
                sibling["lfs"] = {
                    "sha256": blob.sha256,
                    "size": len(blob.data),
                    "pointerSize": blob.pointer_size,
                }
        siblings.append(sibling)
    info = {
        "id": repo.repo_id,
        "modelId": repo.repo_id,
        "sha": commit.sha,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "siblings": siblings,
    }
    return Answer(body=info)


@route("GET", f"/api/models/{REPO}/tree/{REVISION}/?")
def tree(call: Call) -> Answer:
    """The files of a commit, a page at a time; with ?recursive those in folders too."""
    commit = call.commit(call.repo())
    recursive = call.query.get("recursive", ["false"])[0].lower() in ("true", "1", "")
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(commit.files.items()):
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            entries[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
        entries[path] = _entry(path, blob)
        if path in call.hub.unhashed:
            entries[path] |= {"oid": None} | ({"lfs": {"oid": None, "size": 0}} if blob.lfs else {})
    listed = [entry for path, entry in sorted(entries.items()) if recursive or "/" not in path]
    start = int(call.query.get("cursor", ["0"])[0])
    end = start + call.hub.page_size
    headers = {}
    if end < len(listed):
        again = f"{call.hub.url}{quote(call.path)}?recursive={recursive}&cursor={end}"
        headers["Link"] = f'<{again}>; rel="next"'
    return Answer(body=listed[start:end], headers=headers)


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    size = len(blob.data)
    entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": size, "path": path}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": size, "pointerSize": blob.pointer_size}
    return entry


@route("POST", f"/api/models/{REPO}/paths-info/{REVISION}")
def paths_info(call: Call) -> Answer:
    """Some files of a commit, by name; a mirror asks this."""
    files = call.commit(call.repo()).files
    text = call.body.decode()
    wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
    return Answer(body=[_entry(path, files[path]) for path in wanted if path in files])


@route("HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)")
@route("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)")
def resolve(call: Call) -> Answer:
    """A file's bytes, or for LFS the way to the CDN."""
    repo = call.repo(files=True)
    commit = call.commit(repo)
    path = call.groups["path"]
    blob = commit.files.get(path)
    if blob is None:
        refused = Refused(404, "EntryNotFound", "Entry not found")
        headers = {**refused.answer.headers, "X-Repo-Commit": commit.sha}
        return Answer(404, refused.answer.body, headers)
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    if not blob.lfs:
        return Answer(body=blob.data, headers=headers, ranges=True)
    headers["X-Linked-Etag"] = headers.pop("ETag")
    headers["X-Linked-Size"] = str(len(blob.data))
    if call.hub.xet and blob.sha256 in call.hub.xet.hashes:
        token_url = f"{call.hub.url}/api/models/{repo.repo_id}/xet-read-token/{commit.sha}"
        headers["X-Xet-Hash"] = call.hub.xet.hashes[blob.sha256]
        headers["Link"] = f'<{token_url}>; rel="xet-auth"'
    where = quote(f"/{repo.repo_id}/{blob.sha256}/{path}")
    headers["Location"] = f"{call.hub.cdn_url}{where}?Signature={blob.sha256[:16]}"
    return Answer(302, headers=headers)


@route("HEAD", f"/{REPO}/(?P<sha256>[0-9a-f]{{64}})/(?P<path>.+)", cdn=True)
@route("GET", f"/{REPO}/(?P<sha256>[0-9a-f]{{64}})/(?P<path>.+)", cdn=True)
def cdn_blob(call: Call) -> Answer:
    """LFS bytes; a token has no business here, and is refused as a signed address does."""
    if "authorization" in call.headers:
        raise Refused(400, None, "Only one auth mechanism allowed")
    blob = _find_blob(call.hub.store.repos[call.groups["repo"]], call.groups["sha256"])
    headers = {"ETag": f'"{blob.sha256}"', "Accept-Ranges": "bytes"}
    return Answer(body=blob.data, headers=headers, ranges=True)


def _find_blob(repo: Repo, sha256: str) -> Blob:
    for commit in repo.commits.values():
        for blob in commit.files.values():
            if blob.lfs and blob.sha256 == sha256:
                return blob
    raise Refused(404, None, "no such object")
