"""Kills `nf4 download` and `nf4 push` at random moments, runs them again, and prints the table.

    python scripts/campaigns/hub_kills.py [--trials 30] [--seed 0]

Exits 1 if a trial went wrong. The result is kept in docs/reliability.md.
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

from tests.campaigns.hub_kills import COMMANDS, campaign, table
from tests.support.jobs import CPU
from tests.support.tiny import write_falcon, write_recipe


def main() -> None:
    """Makes a tiny verified build, runs the trials, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=30, help="of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_falcon(folder / "tiny-falcon")
        recipe = load_recipe(write_recipe(folder / "recipe"))
        build, _ = run_build(DownloadRequest(str(model), folder / "artifacts"), recipe, CPU, SILENT)
        for command in COMMANDS:
            source = model if command == "download" else build.root
            place = folder / command.replace(" ", "")
            found += campaign(command, args.trials, args.seed, source, place)
            print(f"{command}: done", file=sys.stderr)
    print(f"seed {args.seed}\n\n{table(found)}")
    wrong = [trial for trial in found if trial.problems]
    for trial in wrong:
        print(
            f"{trial.command}, trial {trial.number}:", *trial.problems, sep="\n  ", file=sys.stderr
        )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
