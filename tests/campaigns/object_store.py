"""Builds in S3 of which the server or the driver is killed at random moments.

    python -m tests.campaigns.object_store     makes drivers; a command is JSON, one a line

A driver downloads, quantizes and serializes on an empty disk, in a process of its own: a fork,
since imports take longer than all of that.
`scripts/campaigns/object_store.py` runs the whole campaign.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


class Drivers:
    """The process that makes drivers, from outside."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, *words: object) -> int:
        """Starts a driver, or waits for one.

        Args:
            words: model, URL, folder and part, for its process id; or that, for how it ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def drivers() -> Iterator[Drivers]:
    """Starts the process, with the environment of now, and ends it."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.campaigns.object_store"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        try:
            yield Drivers(process)
        finally:
            process.kill()


class Campaign:
    """Trials on one server.

    Args:
        server: of S3.
        drivers: makes drivers that talk to it.
        model: a checkpoint.
        whole: name -> sha256 of what its build leaves without any URL.
        folder: for the disks of the drivers.
        seed: of the moments.
    """

    def __init__(
        self,
        server: S3Server,
        drivers: Drivers,
        model: Path,
        whole: dict[str, str],
        folder: Path,
        seed: int,
    ) -> None:
        self._server = server
        self._drivers = drivers
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

    def _start(self, part: str = "") -> int:
        """A driver on an empty disk; its process id."""
        self._disks += 1
        disk = self._folder / f"disk-{self._disks}"
        return self._drivers.ask(str(self._model), self._url, str(disk), part)

    def _wait(self, driver: int) -> int:
        return self._drivers.ask(driver)

    def _moment(self) -> None:
        """Waits until the driver has sent some objects, and a little longer."""
        many = 2 + 2 * sum(name.startswith("quantized/") for name in self._whole)
        wanted, end = self._dice.randrange(1, many), time.monotonic() + _PATIENCE
        while self._puts() < wanted and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(self._dice.random() * 2 * PAUSE)

    def _puts(self) -> int:
        notes = self._server.notes
        return notes.read_bytes().count(b'"method": "PUT"') if notes.exists() else 0

    def _server_killed(self) -> None:
        driver = self._start()
        self._moment()
        self._cut = self._server.kill()
        time.sleep(_AWAY)
        self._server.start()
        assert self._wait(driver) == 0

    def _driver_killed(self) -> None:
        driver = self._start()
        self._moment()
        os.kill(driver, signal.SIGKILL)
        assert self._wait(driver) == -signal.SIGKILL
        assert self._wait(self._start()) == 0

    def _parts(self) -> None:
        parts = ["1/3", "2/3", "3/3"]
        self._dice.shuffle(parts)
        running = [self._start(part) for part in parts]
        assert [self._wait(driver) for driver in running] == [0, 0, 0]
        assert self._wait(self._start("merge")) == 0

    def _two_at_once(self) -> None:
        running = [self._start(), self._start()]
        ended = [self._wait(driver) for driver in running]
        assert 0 in ended
        if ended != [0, 0]:  # one of them came at the moment when the other began: it joins in
            assert self._wait(self._start()) == 0


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


def main() -> None:
    """Makes a driver, or waits for one, a line."""
    import torch  # noqa: F401
    import transformers.models.falcon.modeling_falcon  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401

    for line in sys.stdin:
        words = json.loads(line)
        if len(words) == 1:
            print(os.waitstatus_to_exitcode(os.waitpid(words[0], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                drive(Path(words[0]), words[1], Path(words[2]), words[3])
                status = 0
            except Exception as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
