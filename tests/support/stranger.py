"""A Hub that means harm, on three ports of 127.0.0.1, and a process that asks it.

    with Stranger() as stranger, Victim(tmp_path, stranger.url) as victim:
        stranger.twists.append(Twist("HEAD", "*/resolve/*", lambda r: r.with_header("ETag", "x")))
        outcome = victim.do("download")

By itself it answers as a Hub does, for one model and for pushes to it. A twist changes an answer on
its way: its status, headers and body, the body being bytes or pieces that are sent as they come,
without a length. Every request to each port is recorded with its headers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from nf4_pipeline.progress import SilentReporter
from nf4_pipeline.resource_usage import peak_memory

from tests.support.hub_client import ROOT, isolated
from tests.support.hub_store import git_sha1

REPO = "some-org/tiny"
COMMIT = "c" * 40
TOKEN = "hf_TheTokenThatNobodyElseMayHave"
WEIGHTS = "model.safetensors"
FILES = {
    WEIGHTS: bytes(range(256)) * 512,
    "config.json": b'{"model_type": "llama"}',
    "README.md": b"# A card\n",
}


@dataclass(frozen=True)
class Asked:
    """A request: on which port, and what it was."""

    port: str
    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes

    @property
    def has_secret(self) -> bool:
        """Whether the token is anywhere in it."""
        return TOKEN in f"{self.path}{self.query}{self.headers}" or TOKEN.encode() in self.body


@dataclass(frozen=True)
class Reply:
    """What goes back; `raw` in the place of all the rest, `length` whether it is announced."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | Iterable[bytes] = b""
    raw: Iterable[bytes] | None = None
    length: bool = True

    def with_header(self, name: str, value: str | None) -> Reply:
        """With a header set, or taken away."""
        kept = tuple(h for h in self.headers if h[0].lower() != name.lower())
        return replace(self, headers=kept if value is None else (*kept, (name, value)))

    def with_json(self, value: Any) -> Reply:
        """With another body; a text is sent as it is."""
        return replace(self, body=value if isinstance(value, bytes) else json.dumps(value).encode())

    def changed(self, change: Callable[[Any], Any]) -> Reply:
        """With its JSON changed."""
        assert isinstance(self.body, bytes)
        return self.with_json(change(json.loads(self.body)))


@dataclass(frozen=True)
class Twist:
    """A change of the answers to those requests, by method, path below the port, and port."""

    method: str
    path: str
    change: Callable[[Reply], Reply] | Callable[[Reply, Asked], Reply]
    port: str = "home"
    takes_request: bool = False


class Stranger:
    """Three servers; "home" is the one that the user asks."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.twists: list[Twist] = []
        self.head = COMMIT
        self.files = dict(FILES)
        self._servers = {name: _Server(self, name) for name in ("home", "cdn", "evil")}

    @property
    def url(self) -> str:
        return self.at("home")

    def at(self, port: str) -> str:
        """The address of one of the servers."""
        return f"http://127.0.0.1:{self._servers[port].server_address[1]}"

    def reset(self) -> None:
        """Forgets what was asked, and answers as a Hub does again."""
        self.asked, self.twists, self.head, self.files = [], [], COMMIT, dict(FILES)

    def __enter__(self) -> Stranger:
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def leaked(self) -> list[Asked]:
        """Requests that brought the token to somebody else."""
        return [asked for asked in self.asked if asked.port != "home" and asked.has_secret]

    def answer(self, asked: Asked) -> Reply:
        reply = self._plain(asked)
        for twist in self.twists:
            fits = fnmatchcase(asked.path, twist.path) and twist.method in (asked.method, "*")
            if fits and twist.port == asked.port:
                change: Any = twist.change
                reply = change(reply, asked) if twist.takes_request else change(reply)
        return reply

    def _plain(self, asked: Asked) -> Reply:
        """What a Hub answers."""
        name = f"{asked.method} {asked.path}"
        for pattern, answer in self._routes().items():
            if match := re.fullmatch(pattern, name):
                return answer(asked, *match.groups())
        return Reply(404, (("X-Error-Message", "nothing here"),), b"{}")

    def _routes(self) -> dict[str, Callable[..., Reply]]:
        api = f"/api/models/{REPO}"
        return {
            rf"GET {api}(?:/revision/.*)?": self._look_up,
            rf"GET {api}/tree/.*": self._tree,
            rf"(?:GET|HEAD) /{REPO}/resolve/[^/]*/(.*)": self._file,
            r"(?:GET|HEAD) /blobs/([0-9a-f]{64})": self._blob,
            rf"GET {api}/discussions": lambda _: Reply().with_json(
                {"discussions": [], "count": 0, "start": 0}
            ),
            rf"POST {api}/preupload/.*": self._preupload,
            rf"POST /{REPO}.git/info/lfs/objects/batch": self._batch,
            r"POST /verify": lambda _: Reply(),
            r"PUT /store/.*": lambda _: Reply(),
            r"POST /api/validate-yaml": lambda _: Reply().with_json({"errors": [], "warnings": []}),
            rf"POST {api}/commit/.*": self._commit,
            rf"GET {api}/xet-(?:read|write)-token/.*": lambda _: Reply(
                headers=(
                    ("X-Xet-Cas-Url", self.at("cdn")),
                    ("X-Xet-Access-Token", "of-the-store"),
                    ("X-Xet-Token-Expiration", "4102444800"),
                )
            ),
        }

    def _look_up(self, _: Asked) -> Reply:
        return Reply().with_json({"id": REPO, "sha": self.head, "private": False, "siblings": []})

    def _tree(self, _: Asked) -> Reply:
        return Reply().with_json([self.entry(path) for path in sorted(self.files)])

    def entry(self, path: str) -> dict[str, Any]:
        """A file's part of the listing."""
        data = self.files[path]
        found = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
        if path.endswith(".safetensors"):
            sha256 = hashlib.sha256(data).hexdigest()
            found["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
        return found

    def _file(self, _: Asked, path: str) -> Reply:
        data = self.files.get(path)
        if data is None:
            return Reply(404, (("X-Error-Code", "EntryNotFound"), ("X-Repo-Commit", self.head)))
        entry = self.entry(path)
        if "lfs" not in entry:
            return Reply(
                headers=(("X-Repo-Commit", self.head), ("ETag", f'"{entry["oid"]}"')), body=data
            )
        headers = (
            ("X-Repo-Commit", self.head),
            ("X-Linked-Etag", f'"{entry["lfs"]["oid"]}"'),
            ("X-Linked-Size", str(len(data))),
            ("Location", f"{self.at('cdn')}/blobs/{entry['lfs']['oid']}"),
        )
        return Reply(302, headers)

    def _blob(self, asked: Asked, sha256: str) -> Reply:
        found = [data for data in self.files.values() if hashlib.sha256(data).hexdigest() == sha256]
        return Reply(body=found[0]) if found else Reply(404)

    def _preupload(self, asked: Asked) -> Reply:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(asked.body)["files"]
        ]
        return Reply().with_json({"files": files})

    def _batch(self, asked: Asked) -> Reply:
        objects = [
            {
                **wanted,
                "actions": {
                    "upload": {"href": f"{self.at('cdn')}/store/{wanted['oid']}"},
                    "verify": {"href": f"{self.url}/verify"},
                },
            }
            for wanted in json.loads(asked.body)["objects"]
        ]
        return Reply().with_json({"transfer": "basic", "objects": objects})

    def _commit(self, asked: Asked) -> Reply:
        self.head = "d" * 40
        made = {"commitUrl": f"{self.url}/{REPO}/commit/{self.head}", "commitOid": self.head}
        return Reply().with_json(made | {"pullRequestUrl": f"{self.url}/{REPO}/discussions/1"})


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, stranger: Stranger, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.stranger, self.name = stranger, name

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Lost connections: the other side has had enough."""


class _Handler(socketserver.StreamRequestHandler):
    server: _Server
    timeout = 60

    def handle(self) -> None:
        line = self.rfile.readline().decode("latin-1").split()
        if len(line) != 3:
            return
        headers: dict[str, str] = {}
        while (text := self.rfile.readline().decode("latin-1").strip()) != "":
            name, _, value = text.partition(":")
            headers[name.lower()] = value.strip()
        body = self._body(headers)
        url = urlsplit(line[1])
        asked = Asked(self.server.name, line[0], unquote(url.path), url.query, headers, body)
        stranger = self.server.stranger
        stranger.asked.append(asked)
        with suppress(OSError):
            self._send(stranger.answer(asked), asked.method == "HEAD")

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(headers.get("content-length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, reply: Reply, is_head: bool) -> None:
        if reply.raw is not None:
            for piece in reply.raw:
                self.wfile.write(piece)
            return
        names = {name.lower() for name, _ in reply.headers}
        lines = [f"HTTP/1.1 {reply.status} Odd", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in reply.headers]
        if isinstance(reply.body, bytes) and reply.length and "content-length" not in names:
            lines.append(f"Content-Length: {len(reply.body)}")
        head = "\r\n".join(lines) + "\r\n\r\n"
        self.wfile.write(head.encode("utf-8", "surrogateescape"))
        if is_head:
            return
        for piece in [reply.body] if isinstance(reply.body, bytes) else reply.body:
            self.wfile.write(piece)


def dripping(text: bytes, seconds: float = 0.5) -> Iterator[bytes]:
    """One byte after the other, for ever."""
    while True:
        for byte in text:
            yield bytes([byte])
            time.sleep(seconds)


@dataclass(frozen=True)
class Outcome:
    """What came of an order."""

    error: str  # the class of the error, "" if there was none
    message: str
    value: dict[str, Any]
    notes: list[str]
    seconds: float
    memory: int  # bytes at the most, since the process began


@dataclass
class Victim:
    """A process that asks, and the folder that it lives in; its cache is emptied by `forget`."""

    folder: Path
    endpoint: str
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.home = self.folder / "home"
        self.cache = self.home / "hub"
        self.storage = self.cache / f"models--{REPO.replace('/', '--')}"
        self.home.mkdir(parents=True)
        self.log = self.folder.with_name(f"{self.folder.name}.log")
        self._stderr = self.log.open("w")
        variables = {"HF_TOKEN": TOKEN, "HF_HUB_DOWNLOAD_TIMEOUT": "1", **self.variables}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.stranger"],
            env=isolated(self.home, self.endpoint, **variables),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def __enter__(self) -> Victim:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def forget(self) -> None:
        """Empties the cache."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def do(self, what: str, **options: Any) -> Outcome:
        """Gives one order: look-up, download, offline or publish."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what, **options}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        assert self.log.read_text() == "", "something reached the terminal by itself"
        return Outcome(**json.loads(line))


class _Notes(SilentReporter):
    """A reporter that remembers what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def _act(order: dict[str, Any], reporter: _Notes) -> dict[str, Any]:
    from nf4_pipeline import hub

    def sleep(seconds: float) -> None:
        """Waits between tries are counted elsewhere."""

    repo_id = order.get("repo_id", REPO)
    if order["do"] == "publish":
        files = {
            name: hub.LocalFile.of_bytes(text.encode()) for name, text in order["files"].items()
        }
        target = hub.Target(repo_id, pull_request=order.get("pull_request", False))
        made = hub.publish(files, target, hub.CommitMessage("A title"), reporter, sleep=sleep)
        return {"commit": made.commit, "branch": made.branch}
    offline = order["do"] == "offline"
    model = hub.resolve(repo_id, order.get("revision"), offline=offline, sleep=sleep)
    listed = {file.path: [file.size, file.sha256, file.git_sha1] for file in model.files}
    if order["do"] == "look-up":
        return {"commit": model.commit, "listed": listed}
    fetched = hub.fetch(
        model,
        [file for file in model.files if file.path in order.get("only", listed)],
        reporter,
        allow_unhashed=order.get("allow_unhashed", False),
        sleep=sleep,
    )
    return {
        "commit": model.commit,
        "listed": listed,
        "sha256": fetched.sha256,
        "unchecked": list(fetched.unchecked),
    }


def _main() -> None:
    from nf4_pipeline.errors import PipelineError
    from nf4_pipeline.hub import xet

    if os.environ.get("TESTS_XET_STORE") == "folder":
        xet.SCHEMES.append("local")
    for line in sys.stdin:
        order, reporter = json.loads(line), _Notes()
        outcome: dict[str, Any] = {"error": "", "message": "", "value": {}}
        began = time.monotonic()
        try:
            outcome["value"] = _act(order, reporter)
        except PipelineError as error:
            outcome |= {"error": type(error).__name__, "message": str(error)}
        seconds = time.monotonic() - began
        memory = peak_memory()
        print(
            json.dumps(outcome | {"notes": reporter.notes, "seconds": seconds, "memory": memory}),
            flush=True,
        )


if __name__ == "__main__":
    _main()
