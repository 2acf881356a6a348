"""Full disks: a small file system in memory, filled until a stage has too little room.

The tests take a few sizes, `scripts/campaigns/reliability.py disk` takes twenty. Mounting needs
root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from nf4_pipeline.build_folder import Build

from tests.support.folder_state import Content, content, false_records, leftovers
from tests.support.tiny import Done, environment

SIZE: Final = 64 * 2**20

# Without the look at the free space that some stages take before they begin.
_BLIND: Final = """
import sys
from nf4_pipeline.stages.quantize import Quantize
from nf4_pipeline.stages.serialize import Serialize
Quantize.check_disk = Serialize.check_disk = lambda *_, **__: None
from nf4_pipeline.cli import main
main(sys.argv[1:])
"""
_SEEING: Final = "import sys; from nf4_pipeline.cli import main; main(sys.argv[1:])"


@dataclass
class Outcome:
    """A stage on a disk that was too small, and again when there was space.

    Attributes:
        free: bytes that it had.
        blind: it did not look at the free space before it began.
        message: what it ended with.
        faults: what should not be; empty if all is well.
    """

    free: int
    blind: bool
    message: str = ""
    faults: list[str] = field(default_factory=list)


def can_mount() -> bool:
    """Whether this user may mount a file system in memory."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    tried = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/mnt"]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


@contextmanager
def small_disk(folder: Path, options: str = "") -> Iterator[Path]:
    """A file system of 64 MiB at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}{options}", "nf4-test", str(folder)], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def free(folder: Path) -> int:
    """Bytes that are free where a folder is."""
    return shutil.disk_usage(folder).free


def fill(folder: Path, leave: int) -> Path:
    """Fills a disk until `leave` bytes are free, rounded to its blocks."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free(folder) - leave))
    return ballast


def start(command: Sequence[str | Path], disk: Path, *, blind: bool) -> subprocess.Popen[str]:
    """Starts `nf4 COMMAND`, whose temporary files go to the small disk, too."""
    program = _BLIND if blind else _SEEING
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, command)],
        cwd=disk.parent,
        env={**environment(disk.parent), "TMPDIR": str(disk)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Done:
    """Waits for it."""
    out, err = process.communicate()
    return Done(process.returncode, out, err)


def need(command: Sequence[str | Path], disk: Path) -> int:
    """The room that an undisturbed run takes at its peak, as far as can be seen, in bytes."""
    before = lowest = free(disk)
    process = start(command, disk, blind=True)
    while process.poll() is None:
        lowest = min(lowest, free(disk))
        time.sleep(0.0005)
    done = finish(process)
    assert done.status == 0, done.err
    return before - lowest


def too_small(
    command: Sequence[str | Path],
    before: Path | None,
    disk: Path,
    leave: int,
    *,
    blind: bool,
    expected: Content,
    varies: Sequence[str] = (),
) -> Outcome:
    """Runs a stage with too little room, looks at what stands, makes room and runs it again.

    Args:
        command: of `nf4`; its build folder is `disk / "build"`.
        before: the build folder to start from; None for none.
        disk: the small file system.
        leave: bytes that are free when the stage starts.
        blind: without the stage's own look at the free space.
        expected: what the second run must leave.
        varies: files of it that hold times, and are not compared.
    """
    build = Build(disk / "build")
    if before is not None:
        shutil.copytree(before, build.root, symlinks=True)
    stood = content(build)
    ballast = fill(disk, leave)
    found = Outcome(free(disk), blind)
    done = finish(start(command, disk, blind=blind))
    found.message = done.err.strip().splitlines()[-1] if done.err.strip() else ""
    if done.status != 1 or "Traceback" in done.err or "disk" not in found.message:
        found.faults.append(f"status {done.status}: {found.message}")
    if leftovers(build):
        found.faults.append(f"half-written: {leftovers(build)[0]}")
    found.faults += [f"false record {text}" for text in false_records(build)]
    now = content(build)
    gone = [name for name in stood if name.startswith("export/") and now.get(name) != stood[name]]
    found.faults += [f"an earlier export lost {name}" for name in gone[:1]]
    ballast.unlink()
    again = finish(start(command, disk, blind=False))
    if again.status != 0:
        found.faults.append(f"with room: {again.err.strip()}")
    ended = content(build)
    other = [n for n in {*ended, *expected} if ended.get(n) != expected.get(n) and n not in varies]
    found.faults += [f"with room, other bytes: {name}" for name in other[:1]]
    if leftovers(build):
        found.faults.append(f"left over: {leftovers(build)[0]}")
    shutil.rmtree(build.root, ignore_errors=True)
    return found


def after(command: Sequence[str | Path], before: Path | None, disk: Path) -> tuple[int, Content]:
    """The room that a stage needs, and what an undisturbed run leaves."""
    build = Build(disk / "build")
    if before is not None:
        shutil.copytree(before, build.root, symlinks=True)
    room = need(command, disk)
    left = content(build)
    shutil.rmtree(build.root)
    return room, left
