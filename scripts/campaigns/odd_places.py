"""Commands in odd places: full and read-only disks, small limits, odd users, names and clocks.

    sudo python scripts/campaigns/odd_places.py [--only PATTERN] [--verbose]

Prints a table of what was seen, and ends with exit code 1 if anything was not as it must be. If not
run as root, what mounts or becomes another user is left out.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.campaigns.odd_places import can_be_root, run
from tests.campaigns.odd_places_cases import CASES, make_places


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a pattern: of items and names of cases")
    parser.add_argument("--verbose", action="store_true", help="all that a failed case printed")
    parser.add_argument("--places", type=Path, help="where to keep the builds to start from")
    asked = parser.parse_args()
    able = can_be_root()
    failed = False
    with tempfile.TemporaryDirectory(prefix="nf4-odd-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        places = make_places(asked.places or folder / "places")
        print("| item | case | status | seconds | what was seen | ok |\n" + "| --- " * 6 + "|")
        for number, case in enumerate(CASES):
            if not re.search(asked.only, f"{case.item}: {case.name}") or (case.root and not able):
                continue
            seen = run(case, places, folder / str(number))
            failed |= bool(seen.faults)
            what = seen.message.replace(name, "…").replace("|", "\\|")[:300]
            verdict = "yes" if not seen.faults else f"NO: {', '.join(seen.faults)}"
            print(
                f"| {case.item} | {case.name} | {seen.status} | {seen.seconds:.0f} | {what} "
                f"| {verdict} |",
                flush=True,
            )
            if seen.faults and asked.verbose:
                print(seen.text[-6000:], file=sys.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    main()
