"""Commands in odd places: full and read-only disks, small limits, odd users, names and clocks.

Each case is a few lines of bash in a folder of its own, and what must come of the last command in
it. `nf4` stands for this package, `$model` for a tiny checkpoint, `$recipe` for a quick recipe;
`$downloaded`, `$quantized`, `$exported` and `$whole` are build folders that have come so far, and
`copy` makes one of them `build`. Whatever was mounted is gone with the case: it has a name space of
its own. `scripts/campaigns/odd_places.py` runs all of them, the tests those that are quick and need
no rights.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
USER: Final = 12345
PRELUDE: Final = f"""
nf4() {{ {sys.executable} $python -m nf4_pipeline "$@"; }}
copy() {{ cp -a "${{!1}}" "${{2:-build}}"; }}
memory() {{ mkdir -p "$1"; mount -t tmpfs -o "$2" none "$1"; }}
read_only() {{ mkdir -p "$1"; mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"; }}
fill() {{ dd if=/dev/zero of="$1/ballast" bs=4k status=none 2>&1 | true; }}
as_nobody() {{ setpriv --reuid {USER} --regid {USER} --clear-groups \
  --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search -- "$@"; }}
"""


@dataclass(frozen=True)
class Case:
    """One command in an odd place.

    Attributes:
        item: the kind of place.
        name: the place.
        lines: of bash; the status of the last command is that of the case.
        status: that it must have.
        said: a pattern that stdout and stderr must hold.
        root: it mounts something, or becomes another user.
        quick: the test suite runs it.
        seconds: in which it must end.
    """

    item: str
    name: str
    lines: str
    status: Sequence[int] = (0,)
    said: str = ""
    root: bool = False
    quick: bool = False
    seconds: float = 120


@dataclass
class Seen:
    """What came of a case.

    Attributes:
        status: of its last command.
        text: stdout and stderr.
        seconds: that it took.
        faults: what should not be; empty if all is well.
    """

    status: int
    text: str
    seconds: float
    faults: list[str] = field(default_factory=list)

    @property
    def message(self) -> str:
        """The line with the error, or the last one."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "Stopped" in line]
        return (errors or lines or [""])[-1]


def run(case: Case, places: dict[str, Path], folder: Path) -> Seen:
    """Runs a case in an empty folder."""
    folder.mkdir(parents=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTEST_", "NUMBA_"))}
    env |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf-home"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'pipeline'}:{ROOT}",
        "python": "",
        **{name: str(path) for name, path in places.items()},
    }
    command = ["bash", "-c", PRELUDE + case.lines]
    if case.root:
        command = ["unshare", "-m", *command]
    start = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        late = False
        try:
            process.wait(case.seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
        out.seek(0)
        text = out.read().decode("utf-8", "replace")
    seen = Seen(process.returncode, text, time.monotonic() - start)
    if late:
        seen.faults.append(f"did not end within {case.seconds:.0f} s")
    seen.faults += list(_faults(case, seen))
    return seen


def _faults(case: Case, seen: Seen) -> Iterator[str]:
    if seen.status not in case.status:
        yield f"status {seen.status}"
    for word in ("Traceback", "bug in nf4", "Fatal Python", "Exception ignored", "Warning:"):
        if word in seen.text:
            yield word
    if len(re.findall("^Error: ", seen.text, re.MULTILINE)) > 1:
        yield "several errors"
    if not re.search(case.said, seen.text):
        yield f"does not say {case.said!r}"


def can_be_root() -> bool:
    """Whether cases may mount and become another user."""
    tried = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    able = os.geteuid() == 0 and shutil.which("unshare") is not None
    return able and subprocess.run(tried, capture_output=True, check=False).returncode == 0
