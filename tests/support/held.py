r"""A command that waits before a chosen change on the disk, until the test has done its part.

    with held("quantize", "--build-dir", root, cwd=folder, at=Moment("os.rename", r"\.json$", 3)):
        ...  # two files are there, and no more will be

Whoever watches the disk from outside may look too late on a machine that is busy: the command is
over by then. Here it cannot be: every thread that comes to the change, or to a later one of its
kind, waits until the command is interrupted, killed or let go.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.support.hub_client import PYTHONPATH
from tests.support.tiny import environment, listen_to_interrupts

_SECONDS: Final = 300  # until the moment must have come
_WRITES: Final = "os.pwrite"


@dataclass(frozen=True)
class Moment:
    """When a command waits.

    Attributes:
        event: "os.rename", or "os.pwrite" for bytes that are written into a file.
        path: a regular expression for the new name, or for the file.
        number: how many such changes there are with the one that it waits before, from 1.
    """

    event: str
    path: str
    number: int = 1


class Held:
    """The command, which waits."""

    def __init__(self, process: subprocess.Popen[str], go: int) -> None:
        self.process = process
        self._go: int | None = go

    def let_go(self) -> None:
        """Lets it go on."""
        if self._go is not None:
            os.close(self._go)
            self._go = None


@contextmanager
def held(
    *args: str | Path, cwd: Path, at: Moment, variables: Mapping[str, str] | None = None
) -> Iterator[Held]:
    """Runs `nf4 ARGS` in a folder as far as a moment; whatever is left of it at the end is killed.

    Args:
        args: of the command.
        cwd: the folder.
        at: the moment; it is an error if the command ends before.
        variables: environment variables beside those of any such process.
    """
    told, reached = os.pipe()
    wait, go = os.pipe()
    moment = (at.event, at.path, str(at.number), str(reached), str(wait))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.held", *moment, *map(str, args)],
        cwd=cwd,
        env={**environment(cwd), "PYTHONPATH": PYTHONPATH, **(variables or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=(reached, wait),
        preexec_fn=listen_to_interrupts,
    )
    os.close(reached)
    os.close(wait)
    command = Held(process, go)
    try:
        assert select.select([told], [], [], _SECONDS)[0], f"{at} did not come"
        assert os.read(told, 1), f"{at} never came: {process.communicate()}"
        yield command
    finally:
        os.close(told)
        process.kill()
        command.let_go()
        with process:  # waits for it, and closes its streams
            pass


def _wait_before(event: str, path: str, number: int, reached: int, go: int) -> None:
    """Has this process wait before the change of that number."""
    from nf4_pipeline import cli

    pattern, lock, seen = re.compile(path), threading.Lock(), 0

    def come_to(changed: str) -> None:
        nonlocal seen
        if not pattern.search(changed):
            return
        with lock:
            seen += 1
            mine = seen
        if mine == number:
            os.write(reached, b"x")
        while mine >= number and not cli._stopped_by and not select.select([go], [], [], 0.02)[0]:
            pass

    def hook(raised: str, args: tuple[Any, ...]) -> None:
        if raised == event:
            come_to(os.fspath(args[1]))

    if event == _WRITES:
        write = os.pwrite

        def written(descriptor: int, data: Any, offset: int) -> int:
            come_to(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
            return write(descriptor, data, offset)

        os.pwrite = written
    else:
        sys.addaudithook(hook)


def main() -> None:
    """Runs the command."""
    from nf4_pipeline import cli

    event, path, number, reached, go = sys.argv[1:6]
    for descriptor in (int(reached), int(go)):
        os.set_inheritable(descriptor, False)
    # On a busy machine even an orderly end takes its time, and none by force is wanted here.
    cli._PATIENCE = 120.0  # type: ignore[misc]
    _wait_before(event, path, int(number), int(reached), int(go))
    cli.main(sys.argv[6:])


if __name__ == "__main__":
    main()
