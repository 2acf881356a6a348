"""A phase of a child's work in which a stranger's program runs: a template, a tokenizer, a config.

    with limited(f"the chat template of {folder}", PhaseLimits(seconds=20), "Leave it out: --raw."):
        text = tokenizer.apply_chat_template(messages)

What goes wrong in it becomes one error that names it. An exception is turned into that error here.
Code that cannot be interrupted is ended by the system, with the process: by SIGALRM when the time
is up, whatever thread holds the interpreter, or by its own abort when an allocation fails. The
parent was told of the phase, and says what it was.

Time is that of the processor, in the thread that runs the program: a machine on which others work
refuses no honest model. What sleeps is ended by the clock, a few times later.

Only a child is limited so (`arm`). In a process of the user's own, and in tests that run workers
there, exceptions are turned into the error all the same, and nothing else is done.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nf4_pipeline.errors import (
    ArtifactError,
    PipelineError,
    ResourceError,
    is_of_machine,
    of_installation,
)
from nf4_pipeline.printable import printable
from nf4_pipeline.processes.messages import Message, Phase

_STATM: Final = Path("/proc/self/statm")
_DATA_PAGES: Final = 5  # of its numbers, the one that RLIMIT_DATA is held against
_LONGEST_TEXT: Final = 400
_PATIENCE: Final = 6
"""Seconds by the clock for each of processor time."""
_LIBC: Final = ctypes.CDLL(None)
_THREAD_CLOCK: Final = time.CLOCK_THREAD_CPUTIME_ID

_tell: Callable[[Message], None] | None = None


@dataclass(frozen=True)
class PhaseLimits:
    """What a phase may take.

    Attributes:
        seconds: of processor time; by the clock, six times as many.
        data_bytes: of memory, beyond what the process has when the phase begins.
    """

    seconds: float = 20.0
    data_bytes: int = 2**30


def arm(tell: Callable[[Message], None]) -> None:
    """Makes phases of this process, a child, limited ones.

    Args:
        tell: sends a message to the parent.
    """
    global _tell
    for number in (signal.SIGALRM, signal.SIGXCPU):  # a parent may have left them ignored
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an abort at a limit is no crash to study
    _tell = tell


@contextmanager
def limited(
    what: str,
    limits: PhaseLimits,
    remedy: str = "",
    error: type[PipelineError] = ArtifactError,
) -> Iterator[None]:
    """Runs its body within limits; inside of another phase the narrower limits count.

    Args:
        what: the stranger's program, such as "the chat template of FOLDER".
        limits: what it may take.
        remedy: a sentence that says what to do without it.
        error: of the project; raised for whatever foreign error ends the body.

    Raises:
        PipelineError: (`error`) the body raised something foreign, or ran out of memory or stack.
        ResourceError: memory ran out, and this session has a limit of its own for it.
        OSError: the machine failed, and not the stranger's program.
        ImportError: a package that this one needs is not there.
    """
    phase = Phase(what, limits.seconds, limits.data_bytes, remedy, error.__name__)
    try:
        with _armed(phase):
            yield
    except (PipelineError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except MemoryError as cause:
        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:  # not a limit of ours, and a narrow one as a rule
            raise ResourceError(
                f"{what} ran out of the {soft:,} bytes of memory that this session may take. Raise "
                "that limit (ulimit -v)."
            ) from cause
        raise error(phase.too_large()) from cause
    except RecursionError as cause:
        raise error(phase.failure("calls itself too deep")) from cause
    except BaseException as cause:  # a panic of a library in Rust is no Exception
        if is_of_machine(cause) or of_installation(cause, what) is not None:
            raise
        text = " ".join(str(cause).split()) or type(cause).__name__
        said = printable(text, _LONGEST_TEXT).rstrip(".")
        raise error(phase.failure(f"fails: {said}")) from cause


@contextmanager
def _armed(phase: Phase) -> Iterator[None]:
    if _tell is None:
        yield
        return
    _tell(Message(entered=phase))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if sys.platform == "linux":
        wanted = _data_bytes() + phase.data_bytes
        present = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(wanted, *present, wanted), hard))
    start = time.monotonic()
    around, _ = signal.getitimer(signal.ITIMER_REAL)  # of the phase around this one
    timer = _start_timer(phase.seconds)
    patience = phase.seconds * (1 if timer is None else _PATIENCE)
    seconds = min(patience, around) if around else patience
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        if timer is not None:
            _LIBC.timer_delete(timer)
        left = max(around - (time.monotonic() - start), 1e-3) if around else 0.0
        signal.setitimer(signal.ITIMER_REAL, left)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        _tell(Message(left=True))


class _TimerSpec(ctypes.Structure):
    """struct itimerspec: seconds and nanoseconds between signals, and up to the first one."""

    _fields_ = (("every", ctypes.c_long * 2), ("first", ctypes.c_long * 2))


def _start_timer(seconds: float) -> ctypes.c_void_p | None:
    """Sends SIGALRM once this thread has computed for so long; None where the system cannot."""
    timer = ctypes.c_void_p()
    create = getattr(_LIBC, "timer_create", None)
    if sys.platform != "linux" or create is None:
        return None
    if create(_THREAD_CLOCK, None, ctypes.byref(timer)) != 0:  # None: SIGALRM, to the process
        return None
    whole = int(seconds)
    first = (ctypes.c_long * 2)(whole, max(1, int((seconds - whole) * 1e9)))
    _LIBC.timer_settime(timer, 0, ctypes.byref(_TimerSpec(first=first)), None)
    return timer


def _data_bytes() -> int:
    """Memory of this process that is not a mapped file."""
    return int(_STATM.read_text().split()[_DATA_PAGES]) * os.sysconf("SC_PAGE_SIZE")
