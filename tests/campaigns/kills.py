"""SIGKILL at random moments: what stands afterwards, and what the next run makes of it.

The tests run a handful of rounds, `scripts/campaigns/reliability.py kills` runs hundreds.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from nf4_pipeline.build_folder import Build
from nf4_pipeline.records import KINDS

from tests.support.folder_state import Content, content, false_records, leftovers
from tests.support.tiny import nf4, start_nf4

STAGES: Final = ("quantize", "serialize")
OPTIONS: Final = {"quantize": (), "serialize": ("--max-shard-size", "2MB", "--replace")}
EARLIER: Final = ("--max-shard-size", "4MB")
"""How an export was cut that stands already, in every other round of serialize."""


@dataclass
class Round:
    """One kill and the run after it.

    Attributes:
        delay: seconds that the process was left alone, after its start or its first write.
        after_first_write: which of the two.
        reached: "before", "while" or "after" it wrote.
        finished_shards: complete weight files when it died.
        leftovers: half-written files and folders when it died.
        faults: what should not be; empty if all is well.
    """

    delay: float
    after_first_write: bool
    reached: str = ""
    finished_shards: int = 0
    leftovers: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Campaign:
    """A stage of a build, and what an undisturbed run of it makes and takes.

    Attributes:
        stage: its name.
        before: the build folder, ready for the stage.
        expected: digests of quantized/ and export/ afterwards.
        earlier: digests of the export that stands in `before_again`, if the stage makes one.
        before_again: the same, with an export of another recipe in it.
        whole: seconds of the process.
        writing: seconds from its first write to its record.
    """

    stage: str
    before: Path
    expected: Content
    earlier: Content
    before_again: Path
    whole: float
    writing: float


def clone(root: Path, target: Path) -> Build:
    """A build folder that shares the bytes of another: no writer changes a file in place."""

    def link(source: str, destination: str) -> str:
        if Path(source).parent.name == "records" or Path(source).name == ".lock":
            return str(shutil.copy2(source, destination))
        os.link(source, destination, follow_symlinks=False)
        return destination

    shutil.copytree(root, target, symlinks=True, copy_function=link)
    return Build(target)


def _run(build: Build, stage: str, options: tuple[str, ...]) -> None:
    done = nf4(stage, "--build-dir", build.root, *options, cwd=build.root.parent)
    assert done.status == 0, done.err


def _started_writing(build: Build, stage: str) -> bool:
    if stage == "quantize":
        return build.quantized.is_dir() and any(build.quantized.iterdir())
    return (build.root / ".export.partial").exists()


def _recorded(build: Build, stage: str) -> bool:
    return build.record(KINDS[stage]) is not None


def _alive(process: subprocess.Popen[str]) -> bool:
    return process.poll() is None


def _wait(sign: Callable[[], bool], alive: Callable[[], bool]) -> None:
    while alive() and not sign():
        time.sleep(0.0002)


def prepare(downloaded: Path, folder: Path, stage: str) -> Campaign:
    """Runs a stage undisturbed, to know what it makes and how long it takes.

    Args:
        downloaded: a build of which only `download` is done.
        folder: an empty folder for the campaign.
        stage: "quantize" or "serialize".
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = clone(downloaded, folder / "before")
    before_again = before
    earlier: Content = {}
    if stage == "serialize":
        _run(before, "quantize", ())
        before_again = clone(before.root, folder / "before-again")
        _run(before_again, "serialize", EARLIER)
        earlier = content(before_again)
    for attempt in ("warm-up", "undisturbed"):
        build = clone(before.root, folder / attempt)
        start = time.monotonic()
        process = start_nf4(stage, "--build-dir", build.root, *OPTIONS[stage], cwd=folder)
        _wait(partial(_started_writing, build, stage), partial(_alive, process))
        wrote = time.monotonic()
        _wait(partial(_recorded, build, stage), partial(_alive, process))
        recorded = time.monotonic()
        process.communicate()
        whole, writing = time.monotonic() - start, recorded - wrote
        assert process.returncode == 0
    return Campaign(stage, before.root, content(build), earlier, before_again.root, whole, writing)


def kill_once(campaign: Campaign, number: int, rng: random.Random, folder: Path) -> Round:
    """Kills the stage once, looks at what stands, runs it again and looks again.

    Even rounds take a moment of the whole process, odd ones a moment after its first write; of
    serialize, every third and fourth round has an export of another recipe standing there.
    """
    again = campaign.stage == "serialize" and number % 4 >= 2
    build = clone(campaign.before_again if again else campaign.before, folder / "build")
    options = OPTIONS[campaign.stage]
    late = number % 2 == 1
    found = Round(rng.uniform(0, campaign.writing if late else campaign.whole), late)
    process = start_nf4(campaign.stage, "--build-dir", build.root, *options, cwd=folder)
    if late:
        _wait(partial(_started_writing, build, campaign.stage), partial(_alive, process))
    time.sleep(found.delay)
    process.kill()
    process.communicate()
    _look(campaign, build, found, again, killed=process.returncode == -signal.SIGKILL)

    done = nf4(campaign.stage, "--build-dir", build.root, *options, cwd=folder)
    if done.status != 0:
        found.faults.append(f"the next run failed: {done.err.strip()}")
    if content(build) != campaign.expected:
        found.faults.append("the next run ended with other bytes")
    if leftovers(build):
        found.faults.append(f"left over: {leftovers(build)[0].name}")
    found.faults += [f"false record {text}" for text in false_records(build)]
    shutil.rmtree(build.root)
    return found


def _look(campaign: Campaign, build: Build, found: Round, again: bool, *, killed: bool) -> None:
    """What stands after the kill."""
    half = leftovers(build)
    found.leftovers = len(half)
    found.faults += [f"false record {text}" for text in false_records(build)]
    stands = {
        name: digest
        for name, digest in content(build).items()
        if not any((build.root / name).is_relative_to(path) for path in half)
    }
    folder = "quantized" if campaign.stage == "quantize" else "export"
    weights = [n for n in stands if n.startswith(f"{folder}/") and n.endswith(".safetensors")]
    found.finished_shards = len(weights)
    if campaign.stage == "quantize":
        wrong = [name for name in stands if campaign.expected.get(name) != stands[name]]
        found.faults += [f"a wrong file stands: {name}" for name in wrong]
    else:
        export = {n: d for n, d in stands.items() if n.startswith("export/")}
        whole = [_export(campaign.expected), _export(campaign.earlier) if again else {}]
        if export not in whole:
            found.faults.append("half an export stands")
    record = build.record(KINDS[campaign.stage])
    if not killed or (record is not None and not half and stands == campaign.expected):
        found.reached = "after"
    elif half or (weights and not again) or (again and record is None):
        found.reached = "while"
    else:
        found.reached = "before"


def _export(content: Content) -> Content:
    return {name: digest for name, digest in content.items() if name.startswith("export/")}
