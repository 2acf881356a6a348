"""The parent's side of a fork server: workers that need not import what it has imported."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import IO, Any, Final

from nf4_pipeline.processes.temporary import TemporaryFolder
from nf4_pipeline.processes.worker import Environment, Script, Worker

_WAIT: Final = 0.05  # seconds that one thread reads for all
_KILLED: Final = -9

_current: ForkServer | None = None


@contextmanager
def serving(modules: Sequence[str]) -> Iterator[None]:
    """While the body runs, workers of these modules are forked from a process that has imported.

    It begins to import at once; a worker that is asked for before waits for it. On systems other
    than Linux, workers are started as ever.

    Args:
        modules: of workers; each one's `prepare` says what to import.
    """
    global _current
    if sys.platform != "linux" or _current is not None:
        yield
        return
    server = ForkServer(modules)
    _current = server
    try:
        yield
    finally:
        _current = None
        server.close()


def server_for(worker: Worker[Any, Any] | Script[Any, Any]) -> ForkServer | None:
    """The server that forks this worker; None if it is started by itself."""
    fits = (
        _current is not None
        and isinstance(worker, Worker)
        and worker.module in _current.modules
        and worker.environment.keep is None
    )
    return _current if fits else None


class ForkServer:
    """A server, and what it says of its forks.

    Args:
        modules: of the workers that it forks.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = frozenset(modules)
        own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._folder = TemporaryFolder("child")  # for what libraries leave as they are imported
            name = "nf4_pipeline.processes.fork_server"
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", name, str(theirs.fileno()), *modules],
                env=Environment().variables() | {"TMPDIR": str(self._folder.path)},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._socket = own
        self._numbers = count(1)
        self._lock = threading.Lock()
        self._states: dict[int, int | None] = {}  # of forks that run, or their exit status
        self._is_gone = False

    @property
    def pid(self) -> int:
        """Its process id, and so that of the parent of its forks."""
        return self._process.pid

    def fork(self, module: str, environment: Mapping[str, str], stderr: IO[bytes]) -> Forked:
        """Orders a fork; returns at once.

        Args:
            module: of the worker.
            environment: variables beside those of the server.
            stderr: where its standard error goes.
        """
        number = next(self._numbers)
        child_in, own_out = os.pipe()
        own_in, child_out = os.pipe()
        order = {"number": number, "module": module, "environment": dict(environment)}
        try:
            with self._lock, suppress(BrokenPipeError, ConnectionError):
                data = json.dumps(order).encode()
                socket.send_fds(self._socket, [data], [child_in, child_out, stderr.fileno()])
        finally:
            os.close(child_in)
            os.close(child_out)
        return Forked(self, number, os.fdopen(own_out, "wb"), os.fdopen(own_in, "rb"))

    def kill(self, number: int) -> None:
        with self._lock, suppress(BrokenPipeError, ConnectionError):
            self._socket.send(json.dumps({"number": number, "kill": True}).encode())

    def is_begun(self, number: int) -> bool:
        return number in self._states

    def status(self, number: int, seconds: float = 0.0) -> int | None:
        """The exit status of a fork; None if it has not ended within so many seconds."""
        with self._lock:
            while not self._is_gone and select.select([self._socket], [], [], seconds)[0]:
                self._read()
                seconds = 0.0
        return _KILLED if self._is_gone else self._states.get(number)

    def _read(self) -> None:
        try:
            data = self._socket.recv(4096)
        except ConnectionError:
            data = b""
        if data:
            said = json.loads(data)
            self._states[said["number"]] = said["status"]
        else:
            self._is_gone = True

    def close(self) -> None:
        """Ends it; the system ends its forks."""
        with self._lock:
            self._is_gone = True
            self._socket.close()
        self._process.kill()
        self._process.wait()
        self._folder.remove()


class Forked:
    """A fork; like a `subprocess.Popen`, as far as that is used here."""

    def __init__(
        self, server: ForkServer, number: int, stdin: IO[bytes], stdout: IO[bytes]
    ) -> None:
        self.stdin, self.stdout = stdin, stdout
        self._server, self._number = server, number
        self._is_killed = False

    @property
    def parent(self) -> int:
        """The process id of its parent."""
        return self._server.pid

    def poll(self) -> int | None:
        """Its exit status; None as long as it runs or is still to begin."""
        return self._server.status(self._number)

    def wait(self) -> int:
        """Its exit status, once it has ended, or was killed before it began."""
        while (status := self._server.status(self._number, _WAIT)) is None:
            if self._is_killed and not self._server.is_begun(self._number):
                return _KILLED
        return status

    def kill(self) -> None:
        """Ends it."""
        self._is_killed = True
        self._server.kill(self._number)
