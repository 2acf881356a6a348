"""Long campaigns of docs/reliability.md: each prints the table that stands there.

    python scripts/campaigns/reliability.py kills [--rounds 100] [--seed 0]
    python scripts/campaigns/reliability.py variants [--rounds 100] [--seed 0]
    python scripts/campaigns/reliability.py interrupts [--rounds 100] [--seed 0]
    python scripts/campaigns/reliability.py disk [--sizes 20] [--stage STAGE]
    python scripts/campaigns/reliability.py headers [--count 200000] [--seed 0]
    python scripts/campaigns/reliability.py signatures [--rounds 100] [--seed 0]

The test suite runs a few rounds of the same code. `disk` mounts a small tmpfs, which needs root.
Exits 1 if anything was not as it must be.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[2]))

from nf4_pipeline.build_folder import Build
from nf4_pipeline.job import run_stage
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe

from tests.campaigns import disk, headers, kills, side_by_side
from tests.support import tamper
from tests.support.interrupts import interrupt_at_random
from tests.support.jobs import CPU, download
from tests.support.signed import make_keys
from tests.support.tiny import nf4, write_falcon, write_recipe


def downloaded(folder: Path, *, hidden: int = 768, layers: int = 6, shards: int = 6) -> Path:
    """A build of a random Falcon of several shards, in which only `download` is done."""
    model = write_falcon(folder / "model", hidden=hidden, layers=layers, shards=shards)
    build, *_ = download(model, folder / "artifacts")
    return build.root


def run_kills(options: argparse.Namespace, folder: Path) -> int:
    """SIGKILL at random moments of quantize and serialize."""
    root = downloaded(folder)
    faults: list[str] = []
    print("| stage | kills | before it wrote | while it wrote | after | finished shards kept, mean")
    print("| --- | --- | --- | --- | --- | --- |")
    for stage in kills.STAGES:
        campaign = kills.prepare(root, folder / stage, stage)
        dice = random.Random(f"{options.seed} {stage}")
        rounds = []
        for number in range(options.rounds):
            found = kills.kill_once(campaign, number, dice, folder / stage)
            rounds.append(found)
            faults += [f"{stage} {number}: {fault}" for fault in found.faults]
            if options.verbose:
                print(stage, number, found, file=sys.stderr)
        reached = Counter(found.reached for found in rounds)
        kept = sum(found.finished_shards for found in rounds) / len(rounds)
        print(
            f"| {stage} | {len(rounds)} | {reached['before']} | {reached['while']} | "
            f"{reached['after']} | {kept:.1f} |",
            flush=True,
        )
        same = sum(not found.faults for found in rounds)
        print(f"{stage}: {same} of {len(rounds)} without a fault", file=sys.stderr)
    return _report(faults)


def run_headers(options: argparse.Namespace, folder: Path) -> int:
    """Mutations of headers, in memory where there is such a folder."""
    memory = Path("/dev/shm")
    path = (memory if memory.is_dir() else folder) / f"nf4-{os.getpid()}.safetensors"
    try:
        found = headers.campaign(options.count, options.seed, path)
        taken = _also_taken_by_the_library(options, path)
    finally:
        path.unlink(missing_ok=True)
    print("| headers | refused | kinds of refusal | taken | slowest | peak memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(
        f"| {found.count:,} | {sum(found.messages.values()):,} | {len(found.messages)} | "
        f"{found.accepted:,} | {found.slowest * 1000:.0f} ms | {found.peak_memory / 1e6:.0f} MB |"
    )
    print(f"of the first 20,000, the safetensors library takes {taken}")
    faults = [f"crash: {error} on {file!r}" for error, file in found.crashes]
    faults += ["a header took more than a second"] * (found.slowest > 1)
    faults += ["memory went over 200 MB"] * (found.peak_memory > 200e6)
    return _report(faults)


def _also_taken_by_the_library(options: argparse.Namespace, path: Path) -> str:
    """How many of the headers that the parser takes safetensors takes, too, and the reverse."""
    from safetensors import SafetensorError, safe_open

    dice = random.Random(options.seed)
    both = ours = theirs = 0
    for _ in range(20_000):
        accepted = headers.feed(
            headers.mutate(dice.choice(headers.seeds()), dice), path, headers.Outcome()
        )
        try:
            with safe_open(path, framework="np"):
                taken = True
        except (SafetensorError, OSError):
            taken = False
        both += accepted and taken
        ours += accepted and not taken
        theirs += taken and not accepted
    return f"{both} of the {both + ours} that we take, and {theirs} that we refuse"


def run_signatures(options: argparse.Namespace, folder: Path) -> int:
    """Changes to a signed artifact, each of which must be refused."""
    from nf4_pipeline.errors import SignatureError
    from nf4_pipeline.provenance.signing import check, sign

    build = Build(downloaded(folder, hidden=64, layers=2, shards=2))
    for stage in ("quantize", "serialize"):
        run_stage(build, stage, Recipe(), CPU, SILENT)
    private, public = make_keys(folder, "key")
    sign(build.export, private)
    faults: list[str] = []
    print("| change | refused |")
    print("| --- | --- |")
    for kind in tamper.TAMPERINGS:
        dice = random.Random(f"{options.seed} {kind}")
        refused = 0
        for _ in range(options.rounds):
            with tamper.tamper(build.export, kind, dice) as what:
                try:
                    check(build.export, public)
                    faults.append(f"accepted: {what}")
                except SignatureError:
                    refused += 1
        print(f"| {kind} | {refused} of {options.rounds} |")
    print(f"| nothing | accepted, {check(build.export, public)} files |")
    return _report(faults)


def _report(faults: list[str]) -> int:
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"{len(faults)} faults")
    return 1 if faults else 0


VARIES: Final = ("export/verification.json", "export/provenance.json", "export/README.md")
"""Files that hold times."""


def run_disk(options: argparse.Namespace, folder: Path) -> int:
    """Each stage on a disk that is too small by twenty amounts, then with room."""
    if not disk.can_mount():
        print("this needs root, to mount a file system in memory", file=sys.stderr)
        return 2
    recipe = write_recipe(folder / "recipe")
    model = write_falcon(folder / "model", hidden=64, layers=24, shards=3)
    faults: list[str] = []
    with disk.small_disk(folder / "disk") as small:
        common = ("--build-dir", small / "build")
        commands = {
            "download": ("download", model, *common),
            "quantize": ("quantize", *common),
            "serialize": ("serialize", *common, "--max-shard-size", "100KB", "--replace"),
            "verify": ("verify", *common, "--recipe", recipe),
            "attest": ("attest", *common),
        }
        # What stands before serialize runs: an export of another recipe.
        earlier = {"serialize": ("serialize", *common)}
        print("| stage | needs | sizes | typed errors | before it began | while it wrote |")
        print("| --- | --- | --- | --- | --- | --- |")
        before: Path | None = None
        for stage, command in commands.items():
            if options.stage and stage != options.stage:
                before = _advance(folder, small, before, command, stage)
                continue
            start_from = before
            if stage in earlier:
                start_from = _advance(folder, small, before, earlier[stage], "earlier")
            room, expected = disk.after(command, start_from, small)
            found = [
                disk.too_small(
                    command,
                    start_from,
                    small,
                    room * number // options.sizes,
                    blind=number % 2 == 1,
                    expected=expected,
                    varies=VARIES if stage in ("verify", "attest") else (),
                )
                for number in range(options.sizes)
            ]
            faults += [f"{stage}, {f.free:,} free: {fault}" for f in found for fault in f.faults]
            typed = sum(not any("status" in fault for fault in f.faults) for f in found)
            early = sum("is on a disk with" in f.message for f in found)
            print(
                f"| {stage} | {room:,} | {len({f.free for f in found})} | {typed} of {len(found)} "
                f"| {early} | {len(found) - early} |",
                flush=True,
            )
            if options.verbose:
                print(*{f.message for f in found}, sep="\n", file=sys.stderr)
            before = _advance(folder, small, before, command, stage)
    return _report(faults)


def _advance(
    folder: Path, small: Path, before: Path | None, command: Sequence[str | Path], name: str
) -> Path:
    """A build folder after one more stage."""
    build = small / "build"
    if before is not None:
        shutil.copytree(before, build, symlinks=True)
    done = disk.finish(disk.start(command, small, blind=False))
    assert done.status == 0, done.err
    shutil.copytree(build, folder / name, symlinks=True)
    shutil.rmtree(build)
    return folder / name


def run_interrupts(options: argparse.Namespace, folder: Path) -> int:
    """Ctrl-C at random moments of whole builds."""
    recipe = write_recipe(folder / "recipe")
    model = write_falcon(folder / "model", hidden=1024, layers=6, shards=6)
    command = ("build", model, "--recipe", recipe)
    start = time.monotonic()
    done = nf4(*command, "--build-dir", folder / "whole", cwd=folder, timeout=600)
    whole = time.monotonic() - start
    assert done.status == 0, done.err
    dice = random.Random(options.seed)
    faults, slowest, said = [], 0.0, Counter[str]()
    for number in range(options.rounds):
        root = folder / "build"
        found = interrupt_at_random(
            *command, "--build-dir", root, cwd=folder, within=whole, dice=dice
        )
        slowest = max(slowest, found.seconds)
        last = (found.err.strip().splitlines() or [""])[-1]
        said[last.partition(". ")[0] if found.status == 130 else f"status {found.status}"] += 1
        if found.status not in (0, 130) or "Traceback" in found.err:
            faults.append(f"{number}: status {found.status}: {found.err}")
        if kills.leftovers(Build(root)):
            faults.append(f"{number}: half-written {kills.leftovers(Build(root))[0]}")
        shutil.rmtree(root, ignore_errors=True)
    print("| how it ended | of |")
    print("| --- | --- |")
    for text, count in said.most_common():
        print(f"| {text} | {count} |")
    print(f"slowest end after Ctrl-C: {slowest:.2f} s")
    faults += ["it took more than 2 s"] * (slowest > 2)
    return _report(faults)


def run_variants(options: argparse.Namespace, folder: Path) -> int:
    """SIGKILL at random moments of whole builds of two recipes, in turn."""
    plain = write_recipe(folder / "plain")
    calibrated = folder / "calibrated.toml"
    table = '[quantize]\ncalibrate = "self"\ncalibration_tokens = 256\n'
    calibrated.write_text(table + plain.read_text("utf-8"), "utf-8")
    model = write_falcon(folder / "model")
    recipes = [plain, calibrated]
    found = side_by_side.campaign(model, recipes, folder / "all", options.rounds, options.seed)
    print("| kills | last stage done when killed | ended before | faults | verified at the end |")
    print("| --- | --- | --- | --- | --- |")
    reached = ", ".join(f"{stage} {count}" for stage, count in found.reached.most_common())
    print(
        f"| {found.kills} | {reached} | {found.finished} | {len(found.faults)} "
        f"| {found.verified} of 2 |"
    )
    return _report(found.faults)


CAMPAIGNS: Final = {
    "kills": run_kills,
    "variants": run_variants,
    "interrupts": run_interrupts,
    "disk": run_disk,
    "headers": run_headers,
    "signatures": run_signatures,
}


def main() -> None:
    """Runs the campaign named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("campaign", choices=list(CAMPAIGNS))
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--sizes", type=int, default=20)
    parser.add_argument("--stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-v", "--verbose", action="store_true")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nf4-reliability-") as folder:
        status = CAMPAIGNS[options.campaign](options, Path(folder))
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
