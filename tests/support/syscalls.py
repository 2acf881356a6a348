"""What a process asked of the disk, in which order, as strace saw it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_CALLS: Final = "openat,write,pwrite64,ftruncate,fsync,rename,renameat2,link,linkat,unlink,unlinkat"
_LINE: Final = re.compile(r"(\d+)\s+(?:<\.\.\. )?(\w+)(?: resumed>|\()(.*)")
_PATHS: Final = re.compile(r'"((?:[^"\\]|\\.)*)"')
_DESCRIPTOR: Final = re.compile(r"\d+<([^>]*)>")


@dataclass
class Event:
    """One call that succeeded.

    Attributes:
        kind: "write", "fsync", "rename", "exchange", "link" or "unlink".
        path: what it was about; for a rename or a link, what there was before.
        target: for a rename or a link, the new name.
        start, end: lines of the trace between which it happened.
    """

    kind: str
    path: Path
    target: Path | None
    start: int
    end: int


def traced(command: Sequence[str], trace: Path, environment: dict[str, str]) -> list[Event]:
    """Runs a command under strace; it must succeed, and name all files by absolute paths."""
    subprocess.run(
        ["strace", "-f", "-y", "-s", "400", "-e", f"trace={_CALLS}", "-o", str(trace), *command],
        env=environment,
        check=True,
        capture_output=True,
    )
    return _parse(trace.read_text(errors="replace").splitlines())


def _parse(lines: list[str]) -> list[Event]:
    events: list[Event] = []
    open_calls: dict[tuple[str, str], tuple[int, str]] = {}
    for number, line in enumerate(lines):
        match = _LINE.match(line)
        if match is None:
            continue
        process, call, rest = match.groups()
        if rest.endswith("<unfinished ...>"):
            open_calls[process, call] = (number, rest)
            continue
        start = number
        if "resumed>" in line:
            start, begun = open_calls.pop((process, call), (number, ""))
            rest = begun + rest
        if re.search(r"= -1 E\w+", rest):
            continue
        events += _event(call, rest, start, number)
    return events


def _event(call: str, rest: str, start: int, end: int) -> list[Event]:
    paths = [Path(text) for text in _PATHS.findall(rest)]
    if call in ("write", "pwrite64", "ftruncate", "fsync"):
        match = _DESCRIPTOR.match(rest)
        if match is None:
            return []
        kind = "fsync" if call == "fsync" else "write"
        return [Event(kind, Path(match[1]), None, start, end)]
    if call == "openat":
        created = "O_CREAT" in rest and "O_TRUNC" in rest
        return [Event("write", paths[0], None, start, end)] if created else []
    if call in ("unlink", "unlinkat"):
        return [Event("unlink", paths[0], None, start, end)]
    kind = "link" if call.startswith("link") else "rename"
    if "RENAME_EXCHANGE" in rest:
        kind = "exchange"
    return [Event(kind, paths[0], paths[1], start, end)]
