"""A process that imports once what several workers need, and forks each of them from itself.

    python -P -m nf4_pipeline.processes.fork_server SOCKET MODULE...

Importing torch and transformers takes seconds of processor time, which every worker would spend
anew. A fork has them, and nothing else of this process: it has read no request and opened no file.

Orders come over a socket, with the fork's three standard streams: {"number", "module",
"environment"}, or {"number", "kill": true}. Answers: {"number", "status": null} once it runs, and
with its exit status once it has ended. The server and its forks end when whoever started it does.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any, Final, NoReturn

from nf4_pipeline.errors import of_system
from nf4_pipeline.processes.child_side import end_with_parent, prepare
from nf4_pipeline.processes.child_side import main as serve
from nf4_pipeline.processes.messages import ExpectedError, Message
from nf4_pipeline.processes.worker import command
from nf4_pipeline.quiet_libraries import quiet_libraries

_LONGEST_ORDER: Final = 1 << 20
_STREAMS: Final = 3
_THREADS: Final = Path("/proc/self/task")


def main() -> None:
    """Imports, then forks as it is told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and decides
    end_with_parent()
    orders = socket.socket(fileno=int(sys.argv[1]))
    orders.set_inheritable(False)
    quiet_libraries()
    import_module("numpy")
    own = _threads()  # those of its BLAS, which it ends before a fork and begins anew
    for module in sys.argv[2:]:
        prepare(module)
    gc.collect()
    gc.freeze()  # else the first collection in a fork would write to, and so copy, all of it
    # Any other thread would be missing in a fork, with whatever it holds locked.
    _Server(orders, may_fork=_threads() == own).run()


def _refuse(error: OSError, stdout: int) -> None:
    """Says in the place of a child why there is none."""
    told = of_system(error, "start a child process")
    message = Message(error=ExpectedError(type(told).__name__, str(told)))
    with suppress(BrokenPipeError):
        os.write(stdout, json.dumps(message.to_json()).encode() + b"\n")


def _threads() -> int:
    return len(list(_THREADS.iterdir()))


class _Server:
    def __init__(self, orders: socket.socket, *, may_fork: bool) -> None:
        self._orders, self._may_fork = orders, may_fork
        self._running: dict[int, int] = {}  # number of each child by its process id
        self._wake, write = os.pipe()
        for descriptor in (self._wake, write):
            os.set_blocking(descriptor, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(write)

    def run(self) -> NoReturn:
        selector = DefaultSelector()
        selector.register(self._orders, EVENT_READ)
        selector.register(self._wake, EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if self._wake in ready:
                os.read(self._wake, 4096)
                self._reap()
            if self._orders in ready:
                self._take_order()

    def _take_order(self) -> None:
        data, streams, _, _ = socket.recv_fds(self._orders, _LONGEST_ORDER, _STREAMS)
        if not data:
            os._exit(0)  # nobody is there any more; the system ends the forks
        order = json.loads(data)
        number = order["number"]
        if order.get("kill"):
            for pid, of in self._running.items():
                if of == number:
                    os.kill(pid, signal.SIGKILL)
            return
        begin = self._fork if self._may_fork else self._spawn
        try:
            self._running[begin(order, streams)] = number
            self._answer(number, None)
        except OSError as error:  # such as a limit on processes; what is forked already goes on
            _refuse(error, streams[1])
            self._answer(number, 1)
        for stream in streams:
            os.close(stream)

    def _fork(self, order: dict[str, Any], streams: list[int]) -> int:
        if pid := os.fork():
            return pid
        status = 1
        with suppress(BaseException):
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._orders.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            os.environ.update(order["environment"])
            tempfile.tempdir = None  # it was asked for before TMPDIR was this fork's own
            random.seed()
            sys.argv = [sys.argv[0], order["module"]]
            serve()
            status = 0
        os._exit(status)

    def _spawn(self, order: dict[str, Any], streams: list[int]) -> int:
        stdin, stdout, stderr = streams
        environment = os.environ | order["environment"]
        child = subprocess.Popen(
            command(order["module"]), env=environment, stdin=stdin, stdout=stdout, stderr=stderr
        )
        child.returncode = 0  # it is reaped here
        return child.pid

    def _reap(self) -> None:
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._answer(self._running.pop(pid), os.waitstatus_to_exitcode(status))

    def _answer(self, number: int, status: int | None) -> None:
        with suppress(BrokenPipeError):
            self._orders.send(json.dumps({"number": number, "status": status}).encode())


if __name__ == "__main__":
    # By its full name: what a module imports must be this one, not a second copy.
    import_module("nf4_pipeline.processes.fork_server").main()
