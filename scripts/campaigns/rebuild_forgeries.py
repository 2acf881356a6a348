"""Publishes an artifact changed in every way that a forger may think of, and rebuilds each.

    python scripts/campaigns/rebuild_forgeries.py [--only KIND] [--limit N]

Prints a table by kind of change. Exits 1 if an honest artifact did not pass, or a changed one got
another verdict than expected, or was not named. The result is kept in docs/rebuilding.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.report.markdown import table

from tests.campaigns.rebuild_forgeries import (
    GATED_SOURCE,
    OTHER_SOURCE,
    PRIVATE_SOURCE,
    SOURCE,
    Case,
    Cases,
    run_cases,
)
from tests.support.hub_server import HubServer
from tests.support.hub_worker import Worker
from tests.support.published import Artifact, attest, exported, snapshot_of
from tests.support.tiny import write_falcon

BATCH = 25


def problem(case: Case, result: dict[str, Any]) -> str:
    """What is wrong with what was said of a case; "" if nothing is."""
    if result["verdict"] != case.expected:
        return f"{result['verdict']}, expected {case.expected}: {result['why']}"
    if "bug in nf4-pipeline" in result["why"]:
        return result["why"]
    said = " ".join([result["why"], *(d["file"] for d in result["differences"])])
    return "" if case.names in said else f"does not name {case.names!r}: {said}"


def main() -> None:
    """Makes the artifact, publishes all changes of it, rebuilds them, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="kinds of change that begin so")
    parser.add_argument("--limit", type=int, default=10**6, help="cases at most")
    args = parser.parse_args()
    wrong: list[str] = []
    by_kind: dict[str, Counter[str]] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name, HubServer() as hub:
        folder = Path(name)
        model = write_falcon(folder / "tiny", hidden=64)
        repo = hub.store.add(SOURCE, write_falcon(folder / "later", seed=1))
        repo.commit({path.name: path.read_bytes() for path in model.iterdir()})
        other = write_falcon(folder / "other", seed=2)
        hub.store.add(OTHER_SOURCE, other)
        hub.store.add(PRIVATE_SOURCE, model, private=True)
        hub.store.add(GATED_SOURCE, model, gated=True)
        with in_process():
            build = exported(snapshot_of(repo, folder / "cache"), folder / "artifacts")
            attest(build, "forger/honest", measured=True)
            Artifact.of(build, "forger/honest", folder / "honest").publish(hub.store)
            cases = [case for case in Cases(build, hub.store)() if case.kind.startswith(args.only)]
            published = run_cases(cases[: args.limit], build, hub.store, folder / "forged")
        names = ["forger/honest", *published]
        with Worker(folder / "hf", hub.url) as worker:
            for start in range(0, len(names), BATCH):
                batch = names[start : start + BATCH]
                done = worker.nf4(folder, "rebuild", "-q", "--json", *batch)
                for result in done.value["results"]:
                    case = published.get(result["artifact"])
                    if case is None:
                        if result["verdict"] != "PASSED":
                            wrong.append(f"honest: {result}")
                        continue
                    by_kind.setdefault(case.kind, Counter())[result["verdict"]] += 1
                    if text := problem(case, result):
                        wrong.append(f"{case.name}: {text}")
                for repo_id in batch:
                    hub.store.repos.pop(repo_id)
    rows = [
        (kind, str(sum(found.values())), *(str(found[v]) for v in ("PASSED", "FAILED")), str(n))
        for kind, found in by_kind.items()
        for n in (found["NOT_CHECKED"],)
    ]
    total = sum(by_kind.values(), Counter[str]())
    counts = (total["PASSED"], total["FAILED"], total["NOT_CHECKED"])
    rows.append(("all", str(total.total()), *map(str, counts)))
    print(table(("changed", "cases", "PASSED", "FAILED", "NOT_CHECKED"), rows))
    print(*wrong, sep="\n", file=sys.stderr)
    print(f"{len(wrong)} wrong; {time.monotonic() - began:.0f} s", file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
