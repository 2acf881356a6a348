"""What a process and its child say to each other: one JSON object a line."""

from __future__ import annotations

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
    """What a child reads from its standard input before anything else.

    Attributes:
        parent: process id of the process that started it.
        limits: that it sets itself.
        request: the request's JSON.
    """

    parent: int
    limits: Limits
    request: dict[str, Any]


@dataclass(frozen=True)
class TaskStarted(Document):
    """`Reporter.task` was called; see there. `number` names the task in later messages."""

    number: int
    title: str
    total: int
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
    """One line from a child: exactly one of these. A reply, an error or a crash is the last one."""

    started: TaskStarted | None = optional()
    advanced: Advanced | None = optional()
    ended: int | None = optional()
    note: str | None = optional()
    reply: dict[str, Any] | None = optional()
    error: ExpectedError | None = optional()
    crash: Crash | None = optional()
