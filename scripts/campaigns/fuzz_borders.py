"""Strangers' documents, mutated, at every border: Hub replies, manifest, configs, records, card.

    python scripts/campaigns/fuzz_borders.py [--cases 200000] [--seed 1] [--only BORDER] [--case N]

No case may end in an error that is none of ours, nor take more than a second of the processor. Each
follows from the seed, the border and its number: what failed is run again with --only and --case.
Prints a table, and ends with exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from nf4_pipeline.job import run_stage
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.progress import SILENT
from nf4_pipeline.quiet_libraries import quiet_libraries
from nf4_pipeline.recipe import Recipe

from tests.campaigns.borders import Border, Outcome, borders, case, run
from tests.support.jobs import CPU, download
from tests.support.tiny import write_falcon


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200_000, help="in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="one border, by its name in the table")
    parser.add_argument("--case", type=int, help="one case of it, shown and read")
    asked = parser.parse_args()
    quiet_libraries()
    logging.disable(logging.CRITICAL)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="nf4-borders-", dir=memory) as name:
        places = _borders(Path(name))
        chosen = {n: b for n, b in places.items() if asked.only in (None, n)}
        if asked.case is not None:
            (only,) = chosen.items()
            _show(*only, asked.case, asked.seed)
            return
        outcomes = {}
        for number, (border, place) in enumerate(chosen.items()):
            share = asked.cases // len(chosen) + (number < asked.cases % len(chosen))
            outcomes[border] = _feed(border, place, share, asked.seed)
    _table(outcomes)
    sys.exit(any(outcome.failures for outcome in outcomes.values()))


def _borders(folder: Path) -> dict[str, Border]:
    with in_process():
        checkpoint = write_falcon(folder / "model")
        build, *_ = download(checkpoint, folder / "artifacts")
        for stage in ("quantize", "serialize"):
            run_stage(build, stage, Recipe(), CPU, SILENT)
    documents = folder / "documents"
    documents.mkdir()
    return borders(documents, build.root, checkpoint)


def _feed(name: str, border: Border, cases: int, seed: int) -> Outcome:
    border.read(border.seeds[0])  # what is imported late is not the case's time
    outcome = Outcome()
    for number in range(cases):
        run(name, border, number, seed, outcome)
    print(f"{name}: {outcome.cases:,}, {len(outcome.failures)} failures", file=sys.stderr)
    return outcome


def _show(name: str, border: Border, number: int, seed: int) -> None:
    content = case(name, border.seeds, number, seed)
    print(repr(content[:3_000]), f"({len(content):,} bytes)")
    print(repr(border.read(content))[:500])


def _table(outcomes: dict[str, Outcome]) -> None:
    print("| border | cases | refused | read | slowest | failures |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, each in outcomes.items():
        print(
            f"| {name} | {each.cases:,} | {each.refused:,} | {each.accepted:,} | "
            f"{each.slowest * 1e3:.0f} ms | {len(each.failures)} |"
        )
    cases = sum(each.cases for each in outcomes.values())
    failures = sum(len(each.failures) for each in outcomes.values())
    slowest = max(each.slowest for each in outcomes.values())
    print(f"| all | {cases:,} | | | {slowest * 1e3:.0f} ms | {failures} |")
    for name, each in outcomes.items():
        for number, what in each.failures[:10]:
            print(f'failed: --only "{name}" --case {number}: {what}')


if __name__ == "__main__":
    main()
