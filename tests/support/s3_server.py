"""A real S3 server on this machine, moto's, which can be killed and started again with its objects.

moto keeps objects in memory and can note every request; a server that is started again is told all
of them that were noted whole.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

_PATIENCE: Final = 60.0
_SKIPPED: Final = {"host", "content-length", "connection", "transfer-encoding", "expect"}
_BYTES: Final = "application/octet-stream"


class S3Server:
    """The server, from outside.

    Args:
        folder: where it notes what it is asked.
    """

    def __init__(self, folder: Path) -> None:
        self.notes = folder / "requests.jsonl"
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
            [sys.executable, "-W", "ignore", "-m", "moto.server", "-p", str(self._port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"MOTO_RECORDER_FILEPATH": str(self.notes), "MOTO_PORT": str(self._port)},
        )
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                self.ask("GET", "/moto-api/data.json")
                break
            except OSError:
                if time.monotonic() > end or self._process.poll() is not None:
                    raise
                time.sleep(0.05)
        for request in self.requests():
            if request["method"] in ("PUT", "POST", "DELETE"):
                self._repeat(request)
        self.ask("POST", "/moto-api/recorder/start-recording")

    def kill(self) -> None:
        """Kills it by SIGKILL, whatever it is at."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def requests(self) -> list[dict[str, Any]]:
        """What it was asked since it was started first; a note cut short by a kill is dropped."""
        lines = self.notes.read_text("utf-8").splitlines() if self.notes.exists() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def make_bucket(self, name: str) -> str:
        """Makes a bucket; returns the URL of it."""
        self.ask("PUT", f"/{name}")
        return f"s3://{name}"

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

    def _repeat(self, noted: dict[str, Any]) -> None:
        body = noted.get("body") or ""
        data = base64.b64decode(body) if noted.get("body_encoded") else body.encode()
        headers = {"Content-Type": _BYTES} | {
            name.title(): value
            for name, value in noted["headers"].items()
            if name.lower() not in _SKIPPED
        }
        path = noted["url"].removeprefix(self.address)
        request = urllib.request.Request(
            self.address + path, data=data, method=noted["method"], headers=headers
        )
        try:
            urllib.request.urlopen(request, timeout=30).close()
        except urllib.error.HTTPError as error:  # it was refused the first time, too
            error.close()


_SIGNATURE: Final = (
    "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=none"
)


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Starts a server, and kills it at the end."""
    server = S3Server(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()
