"""Two recipes of one model, whole builds by the command line, killed in turn at random moments.

The tests do the same without its last two stages; `scripts/campaigns/reliability.py variants` runs
this.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from nf4_pipeline.build_folder import Build
from nf4_pipeline.builds import list_builds

from tests.support.folder_state import Content, content, false_records, leftovers
from tests.support.tiny import nf4, start_nf4

MEASURED = ("verification.json", "README.md", "report.html", "provenance.json", "bom.cdx.json")
"""Of an export, what holds times, or follows from such a file."""


@dataclass
class Campaign:
    """What came of it.

    Attributes:
        kills: how many times a build was killed.
        reached: how many of them found each stage as the last that was done.
        finished: builds that ended before their kill, and were begun anew.
        verified: artifacts whose verdict was "pass" at the end.
        faults: what should not be; empty if all is well.
    """

    kills: int = 0
    reached: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    verified: int = 0
    faults: list[str] = field(default_factory=list)


def derived(build: Build) -> Content:
    """What follows from source and recipe alone."""
    return {
        name: digest
        for name, digest in content(build).items()
        if not name.endswith(MEASURED) and "/pictures/" not in name
    }


def campaign(model: Path, recipes: list[Path], folder: Path, kills: int, seed: int) -> Campaign:
    """Kills builds of two recipes in turn, then lets both end.

    Args:
        model: its folder.
        recipes: TOML files.
        folder: an empty folder for the campaign.
        kills: how many.
        seed: of the moments.
    """
    found, dice = Campaign(), random.Random(seed)
    undisturbed, there = folder / "undisturbed", folder / "killed"
    for place in (undisturbed, there):
        place.mkdir(parents=True)
    expected: list[tuple[str, Content]] = []
    seconds = []
    for recipe in recipes:
        start = time.monotonic()
        done = nf4("build", model, "--recipe", recipe, "--json", cwd=undisturbed, timeout=900)
        seconds.append(time.monotonic() - start)
        assert done.status == 0, done.err
        root = undisturbed / done.value["build"]
        expected.append((root.name, derived(Build(root))))
    while found.kills < kills:
        mine = found.kills % 2
        name = expected[mine][0]
        build, beside = (Build(there / "artifacts" / expected[n][0]) for n in (mine, 1 - mine))
        before = content(beside)
        process = start_nf4("build", model, "--recipe", recipes[mine], cwd=there)
        time.sleep(dice.uniform(0, seconds[mine]))
        process.kill()
        process.communicate()
        if content(beside) != before:
            found.faults.append(f"a kill of {name} changed {beside.root.name}")
        found.faults += [f"{name}: false record {text}" for text in false_records(build)]
        if process.returncode != -signal.SIGKILL:
            found.finished += 1
            shutil.rmtree(build.root)
            continue
        found.kills += 1
        last = [b.done[-1] for b in list_builds(there / "artifacts") if b.root == build.root]
        found.reached[last[0] if last else "nothing"] += 1
    for recipe in reversed(recipes):
        done = nf4("build", model, "--recipe", recipe, "--json", cwd=there, timeout=900)
        if done.status != 0:
            found.faults.append(f"the last run failed: {done.err.strip()}")
        else:
            found.verified += done.value["verdict"] == "pass"
    if {path.name for path in (there / "artifacts").iterdir()} != {name for name, _ in expected}:
        found.faults.append("other folders than expected")
    for name, files in expected:
        build = Build(there / "artifacts" / name)
        if derived(build) != files:
            found.faults.append(f"{name} has other bytes")
        found.faults += [f"{name}: left over {path.name}" for path in leftovers(build)]
        found.faults += [f"{name}: false record {text}" for text in false_records(build)]
    return found
