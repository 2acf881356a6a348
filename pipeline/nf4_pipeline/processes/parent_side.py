"""The parent's side: starts a worker, follows it, and takes its reply.

A child never outlives its parent: it is ended when the `with` that holds it ends, and by the system
when the parent dies (`child_side.py`). It sees no secret of the environment and no request in
`argv`, and its temporary files are in a folder of its own that is deleted after it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from typing import IO, Any, Final, Generic, Self

from nf4_pipeline import errors
from nf4_pipeline.documents import Document, DocumentError
from nf4_pipeline.errors import PipelineError
from nf4_pipeline.processes.forked import Forked, server_for
from nf4_pipeline.processes.in_process import is_in_process
from nf4_pipeline.processes.messages import Crash, Envelope, ExpectedError, Message, Phase
from nf4_pipeline.processes.temporary import TemporaryFolder
from nf4_pipeline.processes.worker import Reply, Request, Script, Worker, load_function
from nf4_pipeline.progress import LOADING, SILENT, Reporter, Task

_TAIL_LINES: Final = 3
_TAIL_BYTES: Final = 8192
_BEGINS: Final = 5.0  # seconds in which a child has begun, however busy the machine is
_SILENT: Final = "no message"
_IMPORTING: Final = 0  # no number of a task of a child


class ChildFailed(Exception):
    """A child ended without a reply, and not by an error of our tree.

    Attributes:
        status: its exit status; the negative number of a signal that killed it.
        cause: why, in one line: the exception with its message and last frames, or the end of
            what the process wrote to stderr.
        timed_out: the parent ended it, because it took longer than its limit by the clock.
    """

    def __init__(
        self, status: int, cause: str, *, timed_out: bool = False, traceback: str = ""
    ) -> None:
        super().__init__(f"status {status}: {cause}" + (f"\n{traceback}" if traceback else ""))
        self.status = status
        self.cause = cause
        self.timed_out = timed_out


class Child(ABC, Generic[Reply]):
    """A worker at work. Leaving its `with` ends it, whether it has replied or not."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def wait(self) -> Reply:
        """Passes its progress on until it replies.

        Raises:
            PipelineError: the worker raised this error.
            ChildFailed: the process died, timed out, raised another exception, or replied with
                something else than its kind of reply.
        """

    @property
    @abstractmethod
    def is_speaking(self) -> bool:
        """True if something of it has come and waits to be read: progress, its reply, its end."""

    @abstractmethod
    def close(self) -> None:
        """Ends it, and deletes what it left."""


def start(
    worker: Worker[Request, Reply] | Script[Request, Reply],
    request: Request,
    reporter: Reporter = SILENT,
) -> Child[Reply]:
    """Starts a worker and returns at once.

    The thread that calls this must live as long as the child: Linux ends the child with it.

    Args:
        worker: what to run.
        request: sent to it.
        reporter: told how far it is, by the thread that waits for it.
    """
    if is_in_process() and isinstance(worker, Worker):
        return _Here(worker, request, reporter)
    return _Once(_Process(worker), request, reporter)


def run(
    worker: Worker[Request, Reply] | Script[Request, Reply],
    request: Request,
    reporter: Reporter = SILENT,
) -> Reply:
    """Starts a worker and waits for its reply; arguments and errors are those of both."""
    with start(worker, request, reporter) as child:
        return child.wait()


class Waiting(Generic[Request, Reply]):
    """A worker that imports what it needs, and waits for its one request.

    It knows nothing yet of what it will work on. Leaving its `with` ends it. The thread that makes
    it must live as long as the child.
    """

    def __init__(self, worker: Worker[Request, Reply] | Script[Request, Reply]) -> None:
        self._worker = worker
        here = is_in_process() and isinstance(worker, Worker)
        self._process: _Process[Reply] | None = None if here else _Process(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.close()

    def start(self, request: Request, reporter: Reporter = SILENT) -> Child[Reply]:
        """Sends the request and returns at once; arguments are those of `start`."""
        if self._process is None:
            return start(self._worker, request, reporter)
        process, self._process = self._process, None
        return _Once(process, request, reporter)


class Session(Generic[Request, Reply]):
    """A worker that is asked again and again, and keeps in memory what it likes meanwhile.

    Any thread may ask; one does at a time. The child lives until `close`, or until this process
    ends. After an error that is not of our tree, and after an interrupt, it is closed.
    """

    def __init__(self, worker: Worker[Request, Reply]) -> None:
        self._worker = worker
        self._asking = threading.Lock()
        self._ended = threading.Event()
        self._process: _Process[Reply] | None = None
        self._of = os.getpid()
        if not is_in_process():
            self._process = _in_lasting_thread(lambda: _Process(worker), self._ended)

    @property
    def is_usable(self) -> bool:
        """False once it is closed, its child died, or this is a fork of the process it is of."""
        alive = self._process.is_alive if self._process is not None else is_in_process()
        return alive and not self._ended.is_set() and self._of == os.getpid()

    def ask(self, request: Request, reporter: Reporter = SILENT) -> Reply:
        """Sends a request and waits for the reply.

        Args:
            request: sent to the worker.
            reporter: told how far it is.

        Raises:
            PipelineError: the worker raised this error.
            ChildFailed: the process died, raised another exception, or replied with something else
                than its kind of reply.
        """
        if self._process is None:
            return _Here(self._worker, request, reporter).wait()
        with self._asking:
            try:
                self._process.send(request)
                return self._process.reply(reporter)
            except BaseException as error:
                if not isinstance(error, PipelineError) or not self._process.is_waiting:
                    self.close()  # else the next request would get this one's reply
                raise

    def close(self) -> None:
        """Ends the child."""
        if self._process is not None and self._of == os.getpid():
            self._process.close()
        self._ended.set()


def _in_lasting_thread(
    make: Callable[[], _Process[Reply]], ended: threading.Event
) -> _Process[Reply]:
    """Starts a child in a thread that lives until `ended`: Linux ends a child with its thread."""
    made: Future[_Process[Reply]] = Future()

    def live() -> None:
        try:
            made.set_result(make())
        except BaseException as error:
            made.set_exception(error)
        else:
            ended.wait()

    thread = threading.Thread(target=live, daemon=True, name="nf4 session")
    try:
        thread.start()  # an interrupt may come in here, too, with the thread begun
        return made.result()
    except BaseException:  # an interrupt; the child may be just begun
        made.add_done_callback(_close_made)
        ended.set()
        with suppress(RuntimeError):  # the thread did not even begin
            thread.join(_BEGINS)  # else this process may end before the child's folder is deleted
        raise


def _close_made(made: Future[_Process[Reply]]) -> None:
    if made.exception() is None:
        made.result().close()


class _Process(Generic[Reply]):
    """A process that runs a worker, and what goes to it and comes from it."""

    def __init__(self, worker: Worker[Any, Reply] | Script[Any, Reply]) -> None:
        self._worker = worker
        self._timed_out = False
        self.is_waiting = True
        """For a request: it has answered the last one, and may be asked another."""
        self._folder = TemporaryFolder("child")
        # A file, not a pipe: nobody need read it, and it can be as long as it likes.
        self._stderr: IO[bytes] = tempfile.TemporaryFile()
        self._popen = self._begin({"TMPDIR": str(self._folder.path)})
        self._timer: threading.Timer | None = None
        if (seconds := worker.limits.seconds) is not None:
            self._timer = threading.Timer(seconds, self._time_out)
            self._timer.daemon = True
            self._timer.start()

    def _begin(self, environment: dict[str, str]) -> subprocess.Popen[bytes] | Forked:
        worker = self._worker
        if (server := server_for(worker)) is not None and isinstance(worker, Worker):
            own = {**worker.environment.add, **environment}
            return server.fork(worker.module, own, self._stderr)
        return subprocess.Popen(
            worker.command,
            env=worker.environment.variables() | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )

    @property
    def is_alive(self) -> bool:
        return self._popen.poll() is None

    @property
    def is_speaking(self) -> bool:
        stdout = self._popen.stdout
        return stdout is None or stdout.closed or bool(select.select([stdout], [], [], 0)[0])

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._stderr.close()
        self._folder.remove()

    def send(self, request: Document, *, last: bool = False) -> None:
        self.is_waiting = False
        stdin = self._popen.stdin
        assert stdin is not None
        parent = self._popen.parent if isinstance(self._popen, Forked) else os.getpid()
        envelope = Envelope(parent, self._worker.limits, request.to_json())
        with suppress(BrokenPipeError):  # it died; `reply` says of what
            try:
                stdin.write(json.dumps(envelope.to_json()).encode() + b"\n")
                stdin.flush()
            finally:
                if last:
                    stdin.close()

    def reply(self, reporter: Reporter) -> Reply:
        phases: list[Phase] = []
        tasks = _Tasks(reporter)
        try:
            tasks.expect()
            last = self._follow(tasks, phases)
        finally:
            tasks.close()
        if last.error is not None:
            self.is_waiting = True
            raise _rebuild(last.error)
        if last.reply is not None:
            self.is_waiting = True
            try:
                return self._worker.reply.from_json(last.reply)
            except DocumentError as error:
                raise ChildFailed(0, f"its reply is malformed: {error}") from error
        status = self._popen.wait()
        if last.crash is not None:
            raise ChildFailed(status, str(last.crash), traceback=last.crash.traceback)
        if phases and not self._timed_out:
            text = phases[-1].ended_by(max(0, -status), self._end_of_stderr())
            raise _rebuild(ExpectedError(phases[-1].error, text))
        cause = self._end_of_stderr()
        if status == -signal.SIGKILL and not self._timed_out:
            cause = f"it was killed{'' if cause == _SILENT else f' ({cause})'}; as a rule, that "
            cause += "means that memory ran out. End other programs, then run the same again"
        raise ChildFailed(status, cause, timed_out=self._timed_out)

    def _follow(self, tasks: _Tasks, phases: list[Phase]) -> Message:
        """Passes progress on; returns the last message, an empty one if the process just died."""
        stdout = self._popen.stdout
        while line := stdout.readline() if stdout is not None else b"":
            try:
                message = Message.from_json(json.loads(line))
            except ValueError:
                if line.endswith(b"\n"):  # else it died in the middle of it
                    self._popen.kill()
                return Message()
            if message.reply is not None or message.error or message.crash:
                return message
            if message.entered is not None:
                phases.append(message.entered)
            elif message.left is not None and phases:
                phases.pop()
            else:
                tasks.take(message)
        return Message()

    def _time_out(self) -> None:
        self._timed_out = True
        self._popen.kill()

    def _end_of_stderr(self) -> str:
        """The last lines that the process wrote, in one."""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _TAIL_BYTES))
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return " / ".join(line.strip() for line in lines[-_TAIL_LINES:]) or _SILENT


class _Once(Child[Reply]):
    """A process that is asked once."""

    def __init__(self, process: _Process[Reply], request: Document, reporter: Reporter) -> None:
        self._reporter = reporter
        self._process = process
        try:
            self._process.send(request, last=True)
        except BaseException:
            self.close()
            raise

    @property
    def is_speaking(self) -> bool:
        return self._process.is_speaking

    def close(self) -> None:
        self._process.close()

    def wait(self) -> Reply:
        return self._process.reply(self._reporter)


class _Tasks:
    """The tasks that a child has open, shown to a reporter of this process."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._open: dict[int, tuple[AbstractContextManager[Task], Task]] = {}

    def expect(self) -> None:
        """Shows that the child imports, until it says its first word."""
        self._begin(_IMPORTING, LOADING, None, "")

    def _begin(self, number: int, title: str, total: int | None, unit: str) -> None:
        context = self._reporter.task(title, total, unit=unit)
        self._open[number] = (context, context.__enter__())

    def _end(self, number: int) -> None:
        if number in self._open:
            self._open.pop(number)[0].__exit__(None, None, None)

    def take(self, message: Message) -> None:
        self._end(_IMPORTING)
        if (begun := message.started) is not None:
            self._begin(begun.number, begun.title, begun.total, begun.unit)
        elif (news := message.advanced) is not None and news.number in self._open:
            self._open[news.number][1].advance(news.amount)
        elif message.ended is not None:
            self._end(message.ended)
        elif message.note is not None:
            self._reporter.note(message.note)
        elif message.detail is not None:
            self._reporter.detail(message.detail)

    def close(self) -> None:
        """Ends those that a child left open when it died."""
        while self._open:
            self._open.popitem()[1][0].__exit__(None, None, None)


class _Here(Child[Reply]):
    """A worker that runs in this process, when it is waited for."""

    def __init__(
        self, worker: Worker[Request, Reply], request: Request, reporter: Reporter
    ) -> None:
        self._worker, self._reporter = worker, reporter
        self._request = json.dumps(request.to_json())

    @property
    def is_speaking(self) -> bool:
        """Never: it begins to work when it is waited for."""
        return False

    def close(self) -> None:
        """Nothing is left of it."""

    def wait(self) -> Reply:
        function, request = load_function(self._worker.module)
        try:
            reply: Document = function(request.from_json(json.loads(self._request)), self._reporter)
        except (PipelineError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise ChildFailed(1, str(Crash.of(error))) from error
        return self._worker.reply.from_json(json.loads(json.dumps(reply.to_json())))


def _rebuild(error: ExpectedError) -> PipelineError:
    kind = getattr(errors, error.name, None)
    if isinstance(kind, type) and issubclass(kind, PipelineError):
        return kind(error.text)
    return PipelineError(error.text)
