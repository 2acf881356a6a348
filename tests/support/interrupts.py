"""Ctrl-C at random moments of a command: how it ends, and how soon."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.tiny import start_nf4


@dataclass(frozen=True)
class Interrupted:
    """A command that got a SIGINT.

    Attributes:
        status: its exit code.
        err: what it said.
        seconds: from the signal to its end.
    """

    status: int
    err: str
    seconds: float


def interrupt_when(
    *args: str | Path, cwd: Path, moment: Callable[[], bool], delay: float = 0.0
) -> Interrupted:
    """Starts `nf4 ARGS`, waits for a moment and `delay` seconds, and sends what Ctrl-C sends."""
    process = start_nf4(*args, cwd=cwd)
    while process.poll() is None and not moment():
        time.sleep(0.001)
    time.sleep(delay)
    return _interrupt(process)


def interrupt_at_random(
    *args: str | Path, cwd: Path, within: float, dice: random.Random
) -> Interrupted:
    """The same after up to `within` seconds, once Python runs the command line."""
    process = start_nf4(*args, cwd=cwd)
    # Before the first handler stands a SIGINT ends any Python program by a traceback.
    time.sleep(0.15 + dice.uniform(0, within))
    return _interrupt(process)


def _interrupt(process: subprocess.Popen[str]) -> Interrupted:
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, err = process.communicate(timeout=60)
    return Interrupted(process.returncode, err, time.monotonic() - start)
