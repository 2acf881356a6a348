"""Processes of one test, told from those of others that run beside it; and waiting for a state."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

PATIENCE: Final = 120.0
"""Seconds after which nothing more is expected to happen, however busy the machine is."""


def eventually(condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Whether a callable gives something true within some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def is_gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def children_of(pid: int) -> set[int]:
    """Processes that another one started, those that have ended included."""
    found: set[int] = set()
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        found |= {int(child) for child in _read(children).split()}
    return found


def command_of(pid: int) -> list[bytes]:
    """The command line of a process; nothing if it has ended."""
    return _read(Path(f"/proc/{pid}/cmdline")).split(b"\0")


def marked(mark: str, module: str = "") -> set[int]:
    """Processes that run and began with a variable in their environment.

    Args:
        mark: NAME=VALUE; a value that nobody else has.
        module: what stands in their command line, too.
    """
    found = {int(path.name) for path in Path("/proc").glob("[0-9]*")}
    return {
        pid
        for pid in found
        if mark.encode() in _read(Path(f"/proc/{pid}/environ")).split(b"\0")
        and (not module or module.encode() in command_of(pid))
        and not is_gone(pid)
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended, or is another user's
        return b""
