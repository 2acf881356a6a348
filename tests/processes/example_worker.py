"""A worker that does as it is told, for the tests of the protocol."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nf4_pipeline.documents import Document
from nf4_pipeline.errors import ArchitectureError, ArtifactError
from nf4_pipeline.processes.phase import PhaseLimits, limited
from nf4_pipeline.processes.worker import Environment, Worker
from nf4_pipeline.progress import SILENT, Reporter

from tests.support.hub_client import PYTHONPATH


@dataclass(frozen=True)
class Order(Document):
    """Which of `DEEDS` to do, and with what."""

    deed: str
    text: str = ""


@dataclass(frozen=True)
class Outcome(Document):
    """What came of it."""

    text: str
    pid: int


class PanicException(BaseException):
    """As pyo3 raises for a panic in Rust: no Exception, and its message has several lines."""


def run(request: Order, reporter: Reporter) -> Outcome:
    return Outcome(DEEDS[request.deed](request.text, reporter) or "", os.getpid())


def _progress(text: str, reporter: Reporter) -> str:
    reporter.note("begun")
    reporter.detail("why")
    with reporter.task("outer", 3, unit="steps") as outer, reporter.task("inner", 7) as inner:
        outer.advance(1)
        inner.advance(7)
        outer.advance(2)
    return text


def _refuse(text: str, reporter: Reporter) -> None:
    raise ArchitectureError(text)


def _panic(text: str, reporter: Reporter) -> None:
    raise PanicException(f"range end index 8\nout of range: {text}")


def _exit(text: str, reporter: Reporter) -> None:
    sys.exit(int(text))


def _die(text: str, reporter: Reporter) -> None:
    print("first words", "last words", sep="\n", file=sys.stderr, flush=True)
    os.kill(os.getpid(), int(text))


def _spin(text: str, reporter: Reporter) -> None:
    while True:
        pass


def _sleep(text: str, reporter: Reporter) -> None:
    with reporter.task("sleep", 1):
        time.sleep(60)


def _allocate(text: str, reporter: Reporter) -> str:
    return str(len(bytearray(int(text))))


def _print(text: str, reporter: Reporter) -> str:
    print(text)
    os.write(1, text.encode())
    subprocess.run(["echo", text], check=True)
    return text


def _environment(text: str, reporter: Reporter) -> str:
    return "\n".join(f"{name}={value}" for name, value in os.environ.items())


def _arguments(text: str, reporter: Reporter) -> str:
    return Path("/proc/self/cmdline").read_text()


def _temporary(text: str, reporter: Reporter) -> str:
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(b"left behind")
    return file.name


def _limits(text: str, reporter: Reporter) -> str:
    return str(resource.getrlimit(resource.RLIMIT_CPU)[0])


def _interrupt(text: str, reporter: Reporter) -> str:
    os.kill(os.getpid(), signal.SIGINT)
    return "still here"


def _phase(text: str, reporter: Reporter) -> str:
    """A deed within a phase, then another outside: "spin; 200" spins, then takes 200 MiB."""
    deed, _, after = text.partition("; ")
    with limited("the deed", PhaseLimits(0.5, 2**28), "Do another.", ArchitectureError):
        PHASES[deed]()
    return str(len(bytearray(int(after or 0) * 2**20)))


def _recurse() -> None:
    _recurse()


def _nested() -> None:
    with limited("the inner deed", PhaseLimits(60, 2**40), "", ArtifactError):
        time.sleep(60)


def _after_nested() -> None:
    with limited("the inner deed", PhaseLimits(0.1, 2**20), "", ArtifactError):
        pass
    time.sleep(60)


def _raise(error: BaseException) -> None:
    raise error


PHASES: Final[dict[str, Callable[[], object]]] = {
    "nothing": lambda: None,
    "spin": lambda: _spin("", SILENT),
    "sleep": lambda: time.sleep(60),
    "wait": lambda: time.sleep(1),
    "hold the interpreter": lambda: sum(range(10**11)),
    "allocate": lambda: bytearray(2**30),
    "allocate little": lambda: bytearray(2**27),
    "recurse": _recurse,
    "abort": os.abort,
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "fail": lambda: _raise(ValueError("no \x1b[31m\nway.")),
    "panic": lambda: _raise(PanicException("index 14")),
    "refuse": lambda: _raise(ArtifactError("as it is")),
    "nested": _nested,
    "after nested": _after_nested,
}


def _remember(text: str, reporter: Reporter) -> str:
    _REMEMBERED.append(text)
    return " ".join(_REMEMBERED)


_REMEMBERED: Final[list[str]] = []

DEEDS: Final[dict[str, Callable[[str, Reporter], str | None]]] = {
    "progress": _progress,
    "refuse": _refuse,
    "panic": _panic,
    "exit": _exit,
    "die": _die,
    "spin": _spin,
    "sleep": _sleep,
    "allocate": _allocate,
    "print": _print,
    "environment": _environment,
    "arguments": _arguments,
    "temporary": _temporary,
    "limits": _limits,
    "interrupt": _interrupt,
    "phase": _phase,
    "remember": _remember,
}


PATHS: Final = {"PYTHONPATH": PYTHONPATH}
EXAMPLE: Final[Worker[Order, Outcome]] = Worker(
    "tests.processes.example_worker", Outcome, environment=Environment(add=PATHS)
)
