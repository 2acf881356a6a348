"""Who makes a file of quantized/, as its lock file says it: a line for each time it was begun."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_LONGEST: Final = 64 * 2**10


@dataclass(frozen=True)
class Makers:
    """Processes that began to make a file, one after the other.

    Attributes:
        begun: how often; once more than the file needed if a process was killed in the midst.
        pid: of the last one.
        host: where that one runs.
    """

    begun: int
    pid: int
    host: str

    @property
    def may_live(self) -> bool:
        """False where it is known that the last one ended: nobody knows of other hosts."""
        return self.host != socket.gethostname() or Path(f"/proc/{self.pid}").exists()


def begin_making(descriptor: int) -> None:
    """Adds a line for this process to a lock file that it holds."""
    line = f"{os.getpid()} on {socket.gethostname()}\n".encode()
    os.pwrite(descriptor, line, os.fstat(descriptor).st_size)


def owner_of(descriptor: int) -> str:
    """The process that last wrote into a lock file, for people."""
    lines = os.pread(descriptor, _LONGEST, 0).decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "unknown")


def read_makers(path: Path) -> Makers | None:
    """What a lock file says; None if nobody began yet, or it is gone."""
    try:
        with path.open("rb") as file:
            lines = file.read(_LONGEST).decode(errors="replace").splitlines()
        pid, _, host = lines[-1].partition(" on ")
        return Makers(len(lines), int(pid), host)
    except (OSError, ValueError, IndexError):
        return None
