"""A real S3 server on this machine, moto's, which can be killed and started again with its objects.

moto keeps objects in memory, and can note every request. A server that is started again is told all
that were noted whole, before it listens.

    python -m tests.support.s3_server PORT NOTES PAUSE
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

_PATIENCE: Final = 60.0
_SKIPPED: Final = {"host", "content-length", "connection", "transfer-encoding", "expect"}
_BYTES: Final = "application/octet-stream"


class S3Server:
    """The server, from outside.

    Args:
        folder: where it notes what it is asked.
        pause: seconds that it waits in the middle of what is sent to it.
    """

    def __init__(self, folder: Path, pause: float = 0.0) -> None:
        self.notes = folder / "requests.jsonl"
        self._begun = _begun(self.notes)
        self._pause = pause
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = int(free.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def env(self) -> dict[str, str]:
        """What a client must find in its environment."""
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Starts it, and tells it again what an earlier one was told."""
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", "-m", "tests.support.s3_server"),
                *(str(self._port), str(self.notes), str(self._pause)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"MOTO_RECORDER_FILEPATH": str(self.notes)},
        )
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                self.ask("POST", "/moto-api/recorder/start-recording")
                return
            except OSError:
                if time.monotonic() > end or self._process.poll() is not None:
                    raise
                time.sleep(0.05)

    def kill(self) -> int:
        """Kills it by SIGKILL, whatever it is at; returns how many objects were half sent."""
        if self._process is None:
            return 0
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process = None
        lines = self._begun.read_text().split() if self._begun.exists() else []
        self._begun.unlink(missing_ok=True)
        return lines.count("+") - lines.count("-")

    def requests(self) -> list[dict[str, Any]]:
        """What it was asked since it was started first."""
        return noted(self.notes)

    def make_bucket(self, name: str) -> str:
        """Makes a bucket; returns the URL of it."""
        self.ask("PUT", f"/{name}")
        return f"s3://{name}"

    def forget(self, bucket: str) -> None:
        """Once it is killed, nothing of what it was told so far is left but an empty bucket."""
        self.notes.write_text("")
        self.make_bucket(bucket)

    def ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        request = urllib.request.Request(
            self.address + path,
            data=body,
            method=method,
            headers={"Authorization": _SIGNATURE, "Content-Type": _BYTES},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            content: bytes = answer.read()
        return content


_SIGNATURE: Final = (
    "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=none"
)


@contextmanager
def s3_server(folder: Path, pause: float = 0.0) -> Iterator[S3Server]:
    """Starts a server, and kills it at the end; the arguments are those of `S3Server`."""
    server = S3Server(folder, pause)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def noted(notes: Path) -> list[dict[str, Any]]:
    """The requests of a file of notes; one that was cut short by a kill is dropped."""
    found = []
    for line in notes.read_text("utf-8").splitlines() if notes.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _begun(notes: Path) -> Path:
    """Where it notes by a + that an object begins to come, and by a - that it has come."""
    return notes.with_suffix(".begun")


def _read_slowly(environ: dict[str, Any], pause: float, begun: Path) -> bytes:
    """The body of a request, of which the second half comes later."""
    size = int(environ.get("CONTENT_LENGTH") or 0)
    if size < 2:
        return bytes(environ["wsgi.input"].read(size))
    with begun.open("a", buffering=1) as file:
        file.write("+\n")
        first = environ["wsgi.input"].read(size // 2)
        time.sleep(pause)
        content = bytes(first + environ["wsgi.input"].read(size - size // 2))
        file.write("-\n")
    return content


def main(port: int, notes: Path, pause: float) -> None:
    """Answers, with the objects that the requests in a file left."""
    from moto.moto_api import recorder
    from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import run_simple
    from werkzeug.test import Client

    app = DomainDispatcherApplication(create_backend_app)
    client = Client(app)
    for request in noted(notes):
        if request["method"] in ("PUT", "POST", "DELETE") and "/moto-api/" not in request["url"]:
            body = request.get("body") or ""
            data = base64.b64decode(body) if request.get("body_encoded") else body.encode()
            headers = [(k, v) for k, v in request["headers"].items() if k.lower() not in _SKIPPED]
            address = urlsplit(request["url"])
            client.open(
                address.path,
                base_url=f"{address.scheme}://{address.netloc}",
                query_string=address.query,
                method=request["method"],
                headers=headers,
                data=data,
            ).close()

    note, noting = recorder._record_request, threading.Lock()

    def note_alone(*args: Any) -> None:
        with noting:  # else two notes of one moment become one that nobody can read
            note(*args)

    recorder._record_request = note_alone

    def slowly(environ: dict[str, Any], start_response: Any) -> Any:
        if pause and environ["REQUEST_METHOD"] == "PUT":
            environ["wsgi.input"] = BytesIO(_read_slowly(environ, pause, _begun(notes)))
        return app(environ, start_response)

    run_simple("127.0.0.1", port, slowly, threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
