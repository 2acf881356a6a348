"""The child's side: `python -P -m nf4_pipeline.processes.child_side MODULE`.

Requests come on stdin, one a line; most workers get one. What goes to the parent goes through what
was stdout at the start; fd 1 is then the same as fd 2, so that whatever a library prints stands
between no two messages.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib import import_module
from itertools import count
from typing import IO, Any, Final, NoReturn

from nf4_pipeline.errors import PipelineError, is_of_machine, of_installation, of_system
from nf4_pipeline.processes import phase
from nf4_pipeline.processes.messages import (
    Advanced,
    Crash,
    Envelope,
    ExpectedError,
    Limits,
    Message,
    TaskStarted,
)
from nf4_pipeline.processes.worker import load_function
from nf4_pipeline.progress import SILENT, Stage, Task
from nf4_pipeline.quiet_libraries import quiet_libraries

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


def main() -> None:
    """Answers each request that the parent sends, one after the other, and ends with the last."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and decides
    end_with_parent()
    requests = os.fdopen(os.dup(0), "rb")
    pipe = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    quiet_libraries()
    prepare(sys.argv[1])
    sent = requests.readline()
    if not sent:
        os._exit(1)  # the parent died before it could ask, or has nothing to ask
    envelope = Envelope.from_json(json.loads(sent))
    if os.getppid() != envelope.parent:  # it died before it could be seen to
        os._exit(1)
    _limit_itself(envelope.limits)
    reporter = _PipeReporter(pipe)
    phase.arm(reporter.send)
    while sent:
        message = _answer(Envelope.from_json(json.loads(sent)).request, reporter)
        reporter.send(message)
        if message.crash is not None:
            _end(1)
        sent = requests.readline()
    _end(0)


def _answer(asked: dict[str, Any], reporter: _PipeReporter) -> Message:
    try:
        function, request = load_function(sys.argv[1])
        return Message(reply=function(request.from_json(asked), reporter).to_json())
    except PipelineError as error:
        return Message(error=ExpectedError(type(error).__name__, str(error)))
    except BaseException as error:  # a panic of a library in Rust is no Exception
        told = _of_machine(error)
        if told is not None:
            return Message(error=ExpectedError(type(told).__name__, str(told)))
        return Message(crash=Crash.of(error))


def _of_machine(error: BaseException) -> PipelineError | None:
    """What has nothing to do with what was worked on, as an error of ours."""
    doing = f"child process {sys.argv[1].rpartition('.')[2]}"
    if isinstance(error, OSError | RuntimeError) and is_of_machine(error):
        if isinstance(error, OSError) and error.filename is None:
            error.filename = os.environ.get("TMPDIR")  # where a child leaves files, if any
        return of_system(error, doing)
    return of_installation(error, doing)


def _end(status: int) -> NoReturn:
    # Threads and the teardown of libraries have nothing to add after the last message.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_with_parent() -> None:
    """Has the system kill this process when its parent ends, however that comes to pass."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def prepare(module: str) -> None:
    """Imports what the worker needs while nobody has asked it yet; what fails will fail again."""
    with suppress(Exception):
        begin = getattr(import_module(module), "prepare", None)
        if begin is not None:
            begin()


def _limit_itself(limits: Limits) -> None:
    for kind, limit in (
        (resource.RLIMIT_CPU, limits.processor_seconds),
        (resource.RLIMIT_DATA, limits.data_bytes),
    ):
        if limit is not None:
            _, hard = resource.getrlimit(kind)
            soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (soft, hard))


class _PipeReporter:
    """Tells the parent what a `Reporter` is told."""

    def __init__(self, pipe: IO[str]) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._numbers = count(1)

    def send(self, message: Message) -> None:
        line = json.dumps(message.to_json()) + "\n"
        with self._lock:
            self._pipe.write(line)
            self._pipe.flush()

    def note(self, text: str) -> None:
        self.send(Message(note=text))

    def detail(self, text: str) -> None:
        self.send(Message(detail=text))

    def stage(self, name: str, number: int = 1, of: int = 1) -> AbstractContextManager[Stage]:
        """The parent knows in which stage it is."""
        return SILENT.stage(name, number, of)

    @contextmanager
    def task(self, title: str, total: int | None, *, unit: str = "bytes") -> Iterator[Task]:
        number = next(self._numbers)
        self.send(Message(started=TaskStarted(number, title, total, unit)))
        try:
            yield _PipeTask(self, number)
        finally:
            self.send(Message(ended=number))


class _PipeTask:
    def __init__(self, reporter: _PipeReporter, number: int) -> None:
        self._reporter, self._number = reporter, number

    def advance(self, amount: int) -> None:
        self._reporter.send(Message(advanced=Advanced(self._number, amount)))


if __name__ == "__main__":
    main()
