"""Ctrl-C at random moments of a command: how it ends, and how soon."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.tiny import environment, listen_to_interrupts, start_nf4

# While Python itself still starts, Ctrl-C ends any program by a traceback.
_READY: Final = """
import sys
from nf4_pipeline.cli import main
print("ready", flush=True)
main(sys.argv[1:])
"""


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
    process = subprocess.Popen(
        [sys.executable, "-c", _READY, *map(str, args)],
        cwd=cwd,
        env=environment(cwd),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen_to_interrupts,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.01 + dice.uniform(0, within))
    return _interrupt(process)


def _interrupt(process: subprocess.Popen[str]) -> Interrupted:
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, err = process.communicate(timeout=60)
    return Interrupted(process.returncode, err, time.monotonic() - start)
