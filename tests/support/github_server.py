"""github.com and raw.githubusercontent.com on 127.0.0.1: a proxy that answers for both, by TLS.

    with GitHubServer(tmp_path, {"org/hf-name": {"hf-name": b"#!/bin/sh"}}) as github:
        subprocess.run(["hf", "extensions", "install", "org/hf-name"], env=github.environment)

An unmodified client reaches it through HTTPS_PROXY, and believes it by SSL_CERT_FILE. It knows the
pages of repos, the files at HEAD, and the commit that Git is told of.
"""

from __future__ import annotations

import datetime
import os
import ssl
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

HOSTS: Final = ("github.com", "raw.githubusercontent.com")
COMMIT: Final = "c0ffee" + "0" * 34
_HOUR: Final = datetime.timedelta(hours=1)


class GitHubServer:
    """A context manager.

    Args:
        folder: for the certificate.
        repos: the files of each at HEAD.

    Attributes:
        requests: what was asked for, as "METHOD host/path".
    """

    def __init__(self, folder: Path, repos: Mapping[str, Mapping[str, bytes]]) -> None:
        self._certificate = folder / "github.pem"
        self._certificate.write_bytes(_certificate())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._certificate)
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), _handler(repos, context, self.requests)
        )
        self._thread = threading.Thread(target=self._server.serve_forever)

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a client takes this for GitHub."""
        return {
            **os.environ,
            "HTTPS_PROXY": f"http://127.0.0.1:{self._server.server_port}",
            "NO_PROXY": "",
            "no_proxy": "",
            "SSL_CERT_FILE": str(self._certificate),
        }

    def __enter__(self) -> GitHubServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _handler(
    repos: Mapping[str, Mapping[str, bytes]], context: ssl.SSLContext, requests: list[str]
) -> type[BaseHTTPRequestHandler]:
    """Answers CONNECT in clear, and what comes through the tunnel after it."""

    class Handler(BaseHTTPRequestHandler):
        host = ""

        def do_CONNECT(self) -> None:
            self.host = self.path.partition(":")[0]
            self.send_response(200 if self.host in HOSTS else 502)
            self.end_headers()
            if self.host in HOSTS:
                self.wfile.flush()
                with context.wrap_socket(self.connection, server_side=True) as tunnel:
                    self.rfile, self.wfile = tunnel.makefile("rb"), tunnel.makefile("wb")
                    self.handle_one_request()
                    self.rfile.close()
                    self.wfile.close()
            self.close_connection = True

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            requests.append(f"{self.command} {self.host}{self.path}")
            body = _found(repos, self.host, self.path.partition("?")[0].strip("/"))
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("Connection", "close")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body or b"")
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr."""

    return Handler


def _found(repos: Mapping[str, Mapping[str, bytes]], host: str, path: str) -> bytes | None:
    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    files = repos.get(f"{owner}/{name.removesuffix('.git')}")
    if files is None:
        return None
    if host == "raw.githubusercontent.com":
        return files.get(file.removeprefix("HEAD/"))
    if file == "info/refs":
        return f"001e# service=git-upload-pack\n0000{COMMIT} HEAD\0".encode()
    return b"" if not file else None


def _certificate() -> bytes:
    """A key and its own certificate for both hosts, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _HOUR)
        .not_valid_after(now + _HOUR)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(h) for h in HOSTS]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return private + certificate.public_bytes(serialization.Encoding.PEM)
