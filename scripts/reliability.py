"""Long campaigns of docs/reliability.md: each prints the table that stands there.

    python scripts/reliability.py kills [--rounds 100] [--seed 0]
    python scripts/reliability.py disk
    python scripts/reliability.py headers [--count 200000] [--seed 0]
    python scripts/reliability.py signatures [--rounds 100] [--seed 0]

The test suite runs a few rounds of the same code. `disk` mounts a small tmpfs, which needs root.
Exits 1 if anything was not as it must be.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline.progress import SILENT
from pipeline.stages import download
from tests.support import kills
from tests.support.tiny import write_falcon


def downloaded(folder: Path, *, hidden: int = 768, layers: int = 6, shards: int = 6) -> Path:
    """A build of a random Falcon of several shards, in which only `download` is done."""
    model = write_falcon(folder / "model", hidden=hidden, layers=layers, shards=shards)
    build, *_ = download.run(str(model), folder / "artifacts", SILENT)
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


def _report(faults: list[str]) -> int:
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"{len(faults)} faults")
    return 1 if faults else 0


def main() -> None:
    """Runs the campaign named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("campaign", choices=["kills"])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-v", "--verbose", action="store_true")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nf4-reliability-") as folder:
        status = {"kills": run_kills}[options.campaign](options, Path(folder))
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
