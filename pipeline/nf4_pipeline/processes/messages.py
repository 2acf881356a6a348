"""What a process and its child say to each other: one JSON object a line."""

from __future__ import annotations

import signal
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.documents import Document, optional

_FRAMES: Final = 4
_LONGEST_TEXT: Final = 600
_LONGEST_TRACEBACK: Final = 20_000


@dataclass(frozen=True)
class Limits(Document):
    """What a child may take; None for no limit.

    Attributes:
        processor_seconds: of processor time; at the end of it, the system sends SIGXCPU.
        data_bytes: of memory that is not a mapped file; beyond it, allocations fail.
        seconds: from its start to its end by the clock; then the parent ends it.
    """

    processor_seconds: int | None = None
    data_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Envelope(Document):
    """One request: a line that a child reads from its standard input.

    Parent and limits count in the first one.

    Attributes:
        parent: process id of the process that started it.
        limits: that it sets itself.
        request: the request's JSON.
    """

    parent: int
    limits: Limits
    request: dict[str, Any]


@dataclass(frozen=True)
class Phase(Document):
    """A stranger's program begins to run (`phase.py`); what is said if it ends the process.

    Attributes:
        what: the program, such as "the chat template of FOLDER".
        seconds: that it may take.
        data_bytes: of memory that it may take.
        remedy: a sentence that says what to do without it.
        error: class in `nf4_pipeline.errors` of what is raised.
    """

    what: str
    seconds: float
    data_bytes: int
    remedy: str
    error: str

    def failure(self, why: str) -> str:
        """The whole message: what went wrong, and what to do."""
        what = self.what[:1].upper() + self.what[1:]
        return f"{what} {why}." + (f" {self.remedy}" if self.remedy else "")

    def too_large(self) -> str:
        """The message when an allocation failed."""
        return self.failure(
            f"takes more than {self.data_bytes / 2**30:.3g} GiB of memory, which no real one needs"
        )

    def ended_by(self, number: int, last_words: str) -> str:
        """The message when it ended the process.

        Args:
            number: the signal, or 0 if the process ended by itself.
            last_words: the end of what the process wrote to stderr.
        """
        if number in (signal.SIGALRM, signal.SIGXCPU):
            return self.failure(f"takes longer than {self.seconds:.3g} s, which no real one needs")
        if "memory allocation of" in last_words:  # Rust's word before it aborts
            return self.too_large()
        how = f"with {signal.Signals(number).name}" if number else "without a word"
        why = " (as a rule, memory ran out)" if number == signal.SIGKILL else f": {last_words}"
        return self.failure(f"ended the process that ran it {how}{why.rstrip('.')}")


@dataclass(frozen=True)
class TaskStarted(Document):
    """`Reporter.task` was called; see there. `number` names the task in later messages."""

    number: int
    title: str
    total: int | None
    unit: str


@dataclass(frozen=True)
class Advanced(Document):
    """`Task.advance` was called."""

    number: int
    amount: int


@dataclass(frozen=True)
class ExpectedError(Document):
    """An error of our tree.

    Attributes:
        name: of its class in `nf4_pipeline.errors`.
        text: of it, complete.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Crash(Document):
    """Any other exception that ended the work.

    Attributes:
        name: of its class, with the module unless that is `builtins`.
        text: what it says, in one line.
        frames: "FILE:LINE in FUNCTION" of the innermost calls, the one that raised it first.
        traceback: as Python prints it, causes included.
    """

    name: str
    text: str
    frames: tuple[str, ...]
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Crash:
        """Describes an exception."""
        kind = type(error)
        module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
        frames = traceback.extract_tb(error.__traceback__)[: -_FRAMES - 1 : -1]
        return cls(
            name=f"{module}{kind.__qualname__}",
            text=" ".join(str(error).split())[:_LONGEST_TEXT],
            frames=tuple(
                f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} in {frame.name}"
                for frame in frames
            ),
            traceback="".join(traceback.format_exception(error))[-_LONGEST_TRACEBACK:],
        )

    def __str__(self) -> str:
        """All of it but the traceback, in one line."""
        text = f"{self.name}: {self.text}" if self.text else self.name
        return f"{text} (at {', called at '.join(self.frames)})" if self.frames else text


@dataclass(frozen=True)
class Message(Document):
    """One line from a child: exactly one of these.

    A reply, an error or a crash is the last one of a request.
    """

    entered: Phase | None = optional()
    left: bool | None = optional()

    started: TaskStarted | None = optional()
    advanced: Advanced | None = optional()
    ended: int | None = optional()
    note: str | None = optional()
    detail: str | None = optional()
    reply: dict[str, Any] | None = optional()
    error: ExpectedError | None = optional()
    crash: Crash | None = optional()
