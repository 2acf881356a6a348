"""Builds in S3, of which the server or the driver is killed at random moments; prints the table.

    python scripts/campaigns/object_store.py [--trials 20] [--seed 0] [--hidden 256]

Exits 1 if a trial went wrong. The result is kept in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from nf4_pipeline.job import run_stage
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe

from tests.campaigns.object_store import KINDS, PAUSE, Campaign, drivers, table
from tests.support.jobs import CPU, download
from tests.support.stores import hashes, served
from tests.support.tiny import write_falcon


def main() -> None:
    """Makes a model, and what it must become; runs the trials, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="of each kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_falcon(folder / "falcon", hidden=args.hidden, layers=4, shards=6)
        with in_process():
            build, *_ = download(model, folder / "whole")
            for stage in ("quantize", "serialize"):
                run_stage(build, stage, Recipe(), CPU, SILENT)
        whole = hashes(build)
        found = []
        with served(folder / "server", PAUSE) as server, drivers() as made:
            campaign = Campaign(server, made, model, whole, folder, args.seed)
            for kind in KINDS:
                for _ in range(args.trials if "killed" in kind else 2):
                    found.append(campaign.run(kind))
                    print(found[-1], file=sys.stderr)
    print(f"seed {args.seed}, {len(whole)} files\n\n{table(found)}")
    sys.exit(1 if any(trial.problem for trial in found) else 0)


if __name__ == "__main__":
    main()
