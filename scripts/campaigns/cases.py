"""What people give to `nf4 build` in place of a plain checkpoint, and what comes of each.

    python scripts/campaigns/cases.py [--only PATTERN]

Prints the table of docs/reliability.md, a process of `nf4 build` for each row. Exits 1 if a row is
not as expected, and says why below the table. Ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.campaigns.cases import CASES, run_case
from tests.support.checkpoints import make_checkpoint
from tests.support.tiny import write_recipe

_COLUMNS: Final = ("case", "kind", "what comes of it", "stopped in", "seconds", "as expected")


def main() -> int:
    """Runs all cases, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="a regular expression of the case or its kind")
    options = parser.parse_args()
    wrong: list[str] = []
    print(f"| {' | '.join(_COLUMNS)} |\n{'| --- ' * len(_COLUMNS)}|", flush=True)
    with tempfile.TemporaryDirectory(prefix="nf4-cases-") as temporary:
        folder = Path(temporary)
        good = make_checkpoint(folder / "good", "llama")
        recipe = write_recipe(folder / "recipe")
        for number, case in enumerate(CASES):
            if not re.search(options.only, f"{case.case}: {case.kind}"):
                continue
            outcome = run_case(case, good, recipe, folder / f"{number:02d}")
            text = textwrap.shorten(outcome.text, 200, placeholder=" …").replace("|", "\\|")
            cells = [case.case, case.kind, text, outcome.stopped or "—", f"{outcome.seconds:.0f}"]
            print(f"| {' | '.join(cells)} | {'no' if outcome.faults else 'yes'} |", flush=True)
            if outcome.faults:
                faults = ", ".join(outcome.faults)
                wrong.append(f"{case.case}, {case.kind}: {faults}: {outcome.text}")
    print("\n".join(["", f"{len(wrong)} not as expected", *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
