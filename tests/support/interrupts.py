"""Ctrl-C at random moments of a command: how it ends, and how soon."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.held import Moment, held
from tests.support.processes import eventually
from tests.support.tiny import environment, listen_to_interrupts

# While Python itself still starts, Ctrl-C ends any program by a traceback.
_READY: Final = """
import sys
from nf4_pipeline.cli import main
print("ready", flush=True)
main(sys.argv[1:])
"""

_AS_EVER: Final = """
import sys
from nf4_pipeline.cli import main
main(sys.argv[1:])
"""
_PATIENT: Final = """
import sys
from nf4_pipeline import cli
cli._PATIENCE = 120.0
cli.main(sys.argv[1:])
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


def interrupt_held(*args: str | Path, cwd: Path, at: Moment) -> Interrupted:
    """Sends what Ctrl-C sends to `nf4 ARGS`, which waits for it at a moment."""
    with held(*args, cwd=cwd, at=at) as command:
        return _interrupt(command.process)


def interrupt_at_random(
    *args: str | Path, cwd: Path, within: float, dice: random.Random
) -> Interrupted:
    """The same after up to `within` seconds, once Python runs the command line.

    Args:
        args: of `nf4`.
        cwd: the folder in which it runs.
        within: seconds.
        dice: draws the moment.
    """
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


def interrupt_in_stage(
    stage: str, *args: str | Path, cwd: Path, seconds: float, by_force: bool
) -> Interrupted:
    """The same some seconds after a stage of `nf4 build ARGS` began: in it, or after its end.

    Args:
        stage: its name.
        args: of the command.
        cwd: the folder in which it runs.
        seconds: after the line that says that the stage begins.
        by_force: whether it is ended by force if it does not end soon, as a user's is; else it may
            take as long as it likes to end in order, as on a machine that is busy.
    """
    log = cwd / "log"
    with log.open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-c", _AS_EVER if by_force else _PATIENT, "build", *map(str, args)],
            cwd=cwd,
            env=environment(cwd),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=err,
            preexec_fn=listen_to_interrupts,
        )
    try:
        begins = f" {stage}: begins\n"
        assert eventually(lambda: begins in log.read_text() or process.poll() is not None, 300)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        status = process.wait(300)
    finally:
        process.kill()
        process.wait()
    return Interrupted(status, log.read_text(), time.monotonic() - start)


def _interrupt(process: subprocess.Popen[str]) -> Interrupted:
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, err = process.communicate(timeout=300)
    return Interrupted(process.returncode, err, time.monotonic() - start)
