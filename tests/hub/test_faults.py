"""Every fault at every endpoint, into downloads and pushes; see scripts/campaigns/hub_faults.py."""

from __future__ import annotations

from pathlib import Path

from tests.campaigns.hub_faults import all_cases, run_cases, table

STALLS = {("download", "listing"), ("push", "LFS put"), ("push", "commit")}


def test_every_fault_ends_right_or_in_words(verified: Path, tmp_path: Path) -> None:
    cases = [
        case
        for case in all_cases()
        # A stall takes as long as a silence may; three places where it differs are enough here.
        if case.kind != "stall" or (case.endpoint.command, case.endpoint.name) in STALLS
    ]
    results = run_cases(cases, verified, tmp_path / "work", lanes=4)
    print(table(results))
    wrong = {
        (r.case.endpoint.command, r.case.endpoint.name, r.case.kind): r.problems
        for r in results
        if r.problems
    }
    assert wrong == {}
    assert len(results) == len(cases) > 220
    # What passes must be waited out: an error would be easy, and never wrong.
    passing = {"429", "500", "503", "reset", "answer lost", "cut", "no ranges", "corrupt"}
    assert not [r for r in results if r.case.kind in passing and r.outcome.error]
