"""Builds in S3 of which the server or the driver is killed at random moments.

    python -m tests.campaigns.object_store MODEL URL FOLDER [PART]     one driver

A driver downloads, quantizes and serializes in a process of its own, on an empty disk.
`scripts/campaigns/object_store.py` runs the whole campaign.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nf4_pipeline.engine.parts import Part
from nf4_pipeline.job import merge_parts, run_part, run_stage
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import PartialRecipe, Recipe

from tests.support.jobs import CPU, download
from tests.support.s3_server import S3Server
from tests.support.stores import check_published

KINDS: Final = ("server killed", "driver killed", "parts", "two at once")
PAUSE: Final = 0.1  # seconds that the server waits in the middle of an object
_AWAY: Final = 1.0  # seconds that a killed server stays away
_PATIENCE: Final = 300.0


@dataclass(frozen=True)
class Trial:
    """What came of one; `problem` is what must not be."""

    kind: str
    seconds: float
    cut: int  # objects that were half sent when something was killed
    problem: str


class Campaign:
    """Trials on one server.

    Args:
        server: of S3, with a bucket called so.
        model: a checkpoint.
        whole: name -> sha256 of what its build leaves without any URL.
        folder: for the disks of the drivers.
        seed: of the moments.
    """

    def __init__(
        self, server: S3Server, model: Path, whole: dict[str, str], folder: Path, seed: int
    ) -> None:
        self._server = server
        self._model = model
        self._whole = whole
        self._folder = folder
        self._dice = random.Random(seed)
        self._disks = 0
        self._url = ""
        self._cut = 0

    def run(self, kind: str) -> Trial:
        """Runs one trial, with an empty bucket."""
        self._server.kill()
        self._server.notes.unlink(missing_ok=True)
        self._server.start()
        self._server.make_bucket("bucket")
        self._url = f"s3://bucket/runs/{self._disks}"
        self._cut, began = 0, time.monotonic()
        try:
            {
                "server killed": self._server_killed,
                "driver killed": self._driver_killed,
                "parts": self._parts,
                "two at once": self._two_at_once,
            }[kind]()
            check_published(self._url, self._whole)
            problem = ""
        except (AssertionError, OSError) as error:
            problem = " ".join(str(error).split())[:500] or type(error).__name__
        return Trial(kind, time.monotonic() - began, self._cut, problem)

    def _start(self, part: str = "") -> subprocess.Popen[bytes]:
        """A driver on an empty disk."""
        self._disks += 1
        disk = self._folder / f"disk-{self._disks}"
        words = [str(self._model), self._url, str(disk), *([part] if part else [])]
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.campaigns.object_store", *words],
            cwd=Path(__file__).parents[2],
            env=os.environ | self._server.env,
        )

    def _moment(self, driver: subprocess.Popen[bytes]) -> None:
        """Waits until the driver has sent some objects, and a little longer."""
        many = 2 + 2 * sum(name.startswith("quantized/") for name in self._whole)
        wanted, end = self._dice.randrange(1, many), time.monotonic() + _PATIENCE
        while self._puts() < wanted and driver.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(self._dice.random() * 2 * PAUSE)

    def _puts(self) -> int:
        notes = self._server.notes
        return notes.read_bytes().count(b'"method": "PUT"') if notes.exists() else 0

    def _server_killed(self) -> None:
        driver = self._start()
        self._moment(driver)
        self._cut = self._server.kill()
        time.sleep(_AWAY)
        self._server.start()
        assert driver.wait(_PATIENCE) == 0

    def _driver_killed(self) -> None:
        driver = self._start()
        self._moment(driver)
        driver.kill()
        driver.wait()
        assert self._start().wait(_PATIENCE) == 0

    def _parts(self) -> None:
        parts = ["1/3", "2/3", "3/3"]
        self._dice.shuffle(parts)
        running = [self._start(part) for part in parts]
        assert [driver.wait(_PATIENCE) for driver in running] == [0, 0, 0]
        assert self._start("merge").wait(_PATIENCE) == 0

    def _two_at_once(self) -> None:
        running = [self._start(), self._start()]
        ended = [driver.wait(_PATIENCE) for driver in running]
        assert 0 in ended
        if ended != [0, 0]:  # one of them came at the moment when the other began: it joins in
            assert self._start().wait(_PATIENCE) == 0


def table(found: Sequence[Trial]) -> str:
    """What came of the trials, as Markdown."""
    lines = [
        "| trial | ended with the same hashes | killed in mid-write | seconds |",
        "| --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        of = [trial for trial in found if trial.kind == kind]
        if of:
            right = sum(not trial.problem for trial in of)
            cut = sum(trial.cut > 0 for trial in of) if kind == "server killed" else "-"
            seconds = sorted(trial.seconds for trial in of)
            took = f"{seconds[0]:.0f} to {seconds[-1]:.0f}"
            lines.append(f"| {kind} | {right} of {len(of)} | {cut} | {took} |")
    return "\n".join(lines)


def drive(model: Path, url: str, folder: Path, part: str) -> None:
    """What a driver does: all of it, a part, or the merging of parts and the rest."""
    said = PartialRecipe(Recipe(), frozenset())
    with in_process():
        build, *_ = download(model, folder, build_dir=folder / "copy", url=url)
        steps: list[Callable[[], object]] = [
            lambda: run_stage(build, "quantize", Recipe(), CPU, SILENT),
            lambda: run_stage(build, "serialize", Recipe(), CPU, SILENT),
        ]
        if part == "merge":
            steps[0] = lambda: merge_parts(build, said, CPU, SILENT)
        elif part:
            steps = [lambda: run_part(build, Part.parse(part), said, CPU, SILENT)]
        for step in steps:
            step()


if __name__ == "__main__":
    drive(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), "".join(sys.argv[4:]))
