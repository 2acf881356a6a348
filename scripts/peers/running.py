"""Environments of peers, and steps run in them with their time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from peers.contestants import Environment

_OFFLINE: Final = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class StepFailed(Exception):
    """A step of a peer ended badly; its message is the row's reason."""


@dataclass(frozen=True)
class Cost:
    """What a step took.

    Attributes:
        seconds: from the process's start to its end, imports included.
        processor_seconds: of it and of all its children; what else the machine does counts less.
        peak_bytes: resident memory of the largest of its processes.
    """

    seconds: float
    processor_seconds: float
    peak_bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds,
            self.processor_seconds + other.processor_seconds,
            max(self.peak_bytes, other.peak_bytes),
        )


def run_measured(
    command: Sequence[str | Path], log: Path, request: Mapping[str, Any] | None = None
) -> Cost:
    """Runs a command to its end.

    Args:
        command: and its arguments.
        log: where what it prints is kept.
        request: JSON for its stdin.

    Raises:
        StepFailed: it did not end with 0.
    """
    with log.open("ab") as output, tempfile.TemporaryFile("w+") as stdin:
        stdin.write(json.dumps(request or {}))
        stdin.seek(0)
        start = time.perf_counter()
        child = subprocess.Popen(
            [str(part) for part in command],
            stdin=stdin, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **_OFFLINE},
            cwd=log.parent,  # some peers leave logs where they are
        )  # fmt: skip
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        lines = log.read_text("utf-8", "replace").strip().splitlines() or ["it said nothing"]
        raise StepFailed(f"exit code {child.returncode}: {lines[-1]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def make_environment(folder: Path, wanted: Environment, log: Path) -> Path:
    """The Python of a virtual environment with exact versions; makes what is missing.

    torch comes first, as the user's pip is set up for it: a CPU build where its index has one.

    Raises:
        StepFailed: pip could not install them.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    have = versions(python)
    pins = (wanted.torch, *wanted.packages)
    if not all(have.get(name) == version for name, _, version in (p.partition("==") for p in pins)):
        pip = [python, "-m", "pip", "install", "--quiet"]
        run_measured([*pip, wanted.torch], log)
        run_measured([*pip, *pins], log)
    return python


def versions(python: Path) -> dict[str, str]:
    """What is installed, without what follows a "+": by name, in lower case."""
    code = (
        "import json; from importlib.metadata import distributions;"
        "print(json.dumps({d.name.lower(): d.version.split('+')[0] for d in distributions()}))"
    )
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found
