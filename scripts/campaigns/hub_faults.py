"""Injects every fault at every endpoint of a Hub into downloads and pushes, and prints the table.

    python scripts/campaigns/hub_faults.py [--stays] [--lanes 12]

With --stays each endpoint also fails for good in four ways, which takes minutes: the client itself
tries most calls six times. Exits 1 if a case went wrong. The result is kept in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from nf4_pipeline.job import run_build
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import load_recipe
from nf4_pipeline.stages.download_request import DownloadRequest

from tests.campaigns.hub_faults import all_cases, messages, run_cases, table
from tests.support.jobs import CPU
from tests.support.tiny import write_falcon, write_recipe

STAYS = ("403", "429", "503", "reset")


def main() -> None:
    """Makes a tiny verified build, runs the cases, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stays", action="store_true", help="also faults that do not pass")
    parser.add_argument("--lanes", type=int, default=8, help="cases side by side")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_falcon(folder / "tiny-falcon")
        recipe = load_recipe(write_recipe(folder / "recipe"))
        build, _ = run_build(DownloadRequest(str(model), folder / "artifacts"), recipe, CPU, SILENT)
        cases = all_cases(stays=STAYS if args.stays else ())
        results = run_cases(cases, build.root, folder / "work", lanes=args.lanes)
    print(table(results))
    print("\nThe messages:\n")
    print(messages(results))
    wrong = [result for result in results if result.problems]
    for result in wrong:
        case = result.case
        print(f"{case.endpoint.command}, {case.endpoint.name}, {case.kind}:", file=sys.stderr)
        print(f"  {result.outcome.message}", file=sys.stderr)
        print(*(f"  {problem}" for problem in result.problems), sep="\n", file=sys.stderr)
    slow = sorted(results, key=lambda result: -result.seconds)[:5]
    for result in slow:
        case = result.case
        print(
            f"{result.seconds:5.1f} s  {case.endpoint.command}, {case.endpoint.name}, {case.kind}",
            file=sys.stderr,
        )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
