"""Runs every block of the documents for real, also the slow ones, and says what came of each.

    python scripts/campaigns/docs.py [--only PART-OF-A-PAGE'S-NAME]

`nf4` is the installed program, each call a process; the models of the Hub are the sample, served
from a Hub on 127.0.0.1. Blocks that are not run are counted, with their reasons. Exit code 1 if a
block fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from nf4_pipeline.sample import MODEL_DIR

from tests.support import hub_uploads
from tests.support.doc_order import VARIABLES, order, serve
from tests.support.hub_client import isolated
from tests.support.hub_server import HubServer

assert hub_uploads  # its routes are registered by importing it


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of the names of the pages that are wanted")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nf4-docs-") as name, HubServer() as hub:
        folder = Path(name)
        order(folder / "order.json", MODEL_DIR, None, only=asked.only)
        serve(hub, MODEL_DIR, folder)
        subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.support.doc_runner", "order.json"],
            cwd=folder,
            env=isolated(folder / "home", hub.url, **VARIABLES | {"OMP_NUM_THREADS": "2"}),
            check=True,
        )
        results = [json.loads(line) for line in (folder / "results.jsonl").open()]
    counts: Counter[str] = Counter()
    for result in results:
        block, fault = result["block"], result["fault"]
        mark = block.get("mark") or "run"
        kind = "FAULT" if fault else "run" if mark == "slow" else mark
        counts[kind] += 1
        why = block.get("why", "")
        print(f"{kind:8} {block['page']}:{block['line']} {result['seconds']} s {why}")
        if fault:
            print(f"         {fault.strip()[-1500:]}")
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    sys.exit("FAULT" in counts)


if __name__ == "__main__":
    main()
