"""SIGKILL at random moments of `nf4 download` and `nf4 push`, then the same command again.

The moment is drawn from a seed: while the n-th request is under way, or some time after the start.
`scripts/campaigns/hub_kills.py` runs the whole campaign.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support import hub_uploads, warm
from tests.support.hub_client import isolated
from tests.support.hub_server import TOKEN, HubServer
from tests.support.hub_store import Repo, git_sha1
from tests.support.tiny import content_of

assert hub_uploads  # its routes are registered by importing it

COMMANDS: Final = ("download", "push", "push --create-pr")
PAUSE: Final = 0.03  # seconds that the server takes for everything, so that there is a middle


@dataclass(frozen=True)
class Killed:
    """One trial; `problems` is what must not be."""

    command: str
    number: int
    requests: int  # that the server had seen when the process was killed
    was_over: bool  # it had ended before
    problems: tuple[str, ...]


def campaign(
    command: str, trials: int, seed: int, source: Path, folder: Path, *, holds: bool = False
) -> list[Killed]:
    """Kills a command once in each of `trials` trials, each with a fresh cache and a fresh repo.

    Args:
        command: one of `COMMANDS`.
        trials: how many.
        seed: of the moments.
        source: a checkpoint for download, a verified build for push.
        folder: for caches and builds.
        holds: let no request be acted on from the chosen one on, until the process is dead: on a
            machine that is busy it might be over before anybody looks.
    """
    dice = random.Random(f"{seed} {command}")
    found = []
    with HubServer() as hub:
        hub.store.users[TOKEN] = "me"
        hub.pause = PAUSE
        whole = _Trial(hub, command, source, folder / "whole")  # how long it takes undisturbed
        requests, seconds = whole.undisturbed()
        for number in range(trials):
            trial = _Trial(hub, command, source, folder / f"trial-{number}")
            if dice.random() < 0.75:
                killed = trial.kill(dice.randint(1, requests), dice.uniform(0, 2 * PAUSE), holds)
            else:
                killed = trial.kill(0, dice.uniform(0, seconds), False)
            problems = (*trial.problems(ended=False), *trial.again())
            found.append(Killed(command, number, *killed, problems))
            shutil.rmtree(trial.folder)
    return found


class _Trial:
    """A repo, a cache and a build folder, and what the command does with them."""

    def __init__(self, hub: HubServer, command: str, source: Path, folder: Path) -> None:
        self.hub, self.command, self.source, self.folder = hub, command, source, folder
        self.build = folder / "build"
        self.repo_id = f"me/{command.split()[-1].strip('-')}-{folder.name}"
        folder.mkdir(parents=True)
        if command == "download":
            self.repo = hub.store.add(self.repo_id, source)
            arguments = ["download", self.repo_id]
        else:
            shutil.copytree(source, self.build, symlinks=True)
            self.repo = hub.store.add(self.repo_id, {"a": b"a"})
            self.repo.writers = {"me"}
            arguments = ["push", "--repo-id", self.repo_id, *command.split()[1:]]
        self.old = self.repo.refs["main"]
        self.arguments = [*arguments, "--build-dir", str(self.build)]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "nf4_pipeline", *self.arguments],
            cwd=self.folder,
            env=warm.variables(isolated(self.folder / "hf", self.hub.url, HF_TOKEN=TOKEN)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def undisturbed(self) -> tuple[int, float]:
        """How many requests a whole run makes, and how long it takes."""
        self.hub.seen.clear()
        begin = time.monotonic()
        process = self.start()
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
        return len(self.hub.seen), time.monotonic() - begin

    def kill(self, requests: int, seconds: float, holds: bool) -> tuple[int, bool]:
        """Kills a run so many seconds after so many requests."""
        self.hub.seen.clear()
        with self.hub.holding(requests) if holds else nullcontext():
            process = self.start()
            while len(self.hub.seen) < requests and process.poll() is None:
                time.sleep(0.001)
            time.sleep(seconds)
            was_over = process.poll() is not None
            process.kill()
            process.communicate()
        return len(self.hub.seen), was_over

    def again(self) -> list[str]:
        """Runs the command to its end; what is wrong then."""
        process = self.start()
        out, _ = process.communicate(timeout=300)
        if process.returncode:
            return [f"run again: {out}"]
        return self.problems(ended=True)

    def problems(self, *, ended: bool) -> list[str]:
        """What must not be, after a kill or after the end."""
        if self.command == "download":
            return self._download_problems(ended)
        return self._push_problems(ended)

    def _download_problems(self, ended: bool) -> list[str]:
        problems = []
        cache = self.folder / "hf" / "hub" / ("models--" + self.repo_id.replace("/", "--"))
        for blob in cache.glob("blobs/*"):
            data = blob.read_bytes()
            names = (hashlib.sha256(data).hexdigest(), git_sha1(data))
            if blob.suffix != ".incomplete" and blob.name not in names:
                problems.append(f"{blob.name} is not what its name says")
        if (self.build / "records" / "download.json").exists() or ended:
            wanted = {path.name: path.read_bytes() for path in self.source.iterdir()}
            if content_of(self.build / "source") != wanted:
                problems.append("source/ is not the checkpoint")
        if ended:
            left = list(cache.rglob("*.incomplete"))
            problems += [f"{path.name} is left behind" for path in left]
            if (cache / "refs" / "main").read_text() != self.old:
                problems.append("refs/main is not the commit")
        return problems

    def _push_problems(self, ended: bool) -> list[str]:
        self.hub.settle()  # a request that the dead process sent may still be under way
        proposes = self.command != "push"
        export = content_of(self.build / "export")
        problems = [
            f"{branch} is neither old nor new"
            for branch in self.repo.refs
            if _held(self.repo, branch) not in ({}, export)
        ]
        if proposes and self.repo.refs["main"] != self.old:
            problems.append("main moved")
        if len(self.repo.commits) > 2 or len(self.repo.pull_requests) > proposes:
            problems.append(f"{self.repo.commits.keys()} commits")
        if ended and _held(self.repo, "refs/pr/1" if proposes else "main") != export:
            problems.append("the export is not there")
        return problems


def _held(repo: Repo, branch: str) -> dict[str, bytes]:
    files = repo.commits[repo.refs[branch]].files
    return {path: blob.data for path, blob in files.items() if path != "a"}


def table(found: Sequence[Killed]) -> str:
    """The campaigns as Markdown."""
    lines = [
        "| command | killed | after … requests | ended right when run again |",
        "|" + " --- |" * 4,
    ]
    for command in COMMANDS:
        some = [trial for trial in found if trial.command == command]
        if some:
            counts = sorted(trial.requests for trial in some)
            in_time = sum(not trial.was_over for trial in some)
            right = sum(not trial.problems for trial in some)
            lines.append(
                f"| `nf4 {command}` | {in_time} of {len(some)} times before its end | "
                f"{counts[0]} to {counts[-1]} | {right} of {len(some)} |"
            )
    return "\n".join(lines)
