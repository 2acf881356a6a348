"""Types every mistake of tests/campaigns/newcomer.py and shows what nf4 says of it.

    python scripts/campaigns/newcomer_mistakes.py [--only PATTERN] [--write docs/messages.md]

Ends with exit code 1 if a message does not say what it must.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.campaigns.newcomer import MISTAKES, faults_of, make_place, message, run_process, serve
from tests.support.hub_server import HubServer
from tests.support.tiny import nf4, write_falcon, write_recipe

HEAD: Final = """# Messages

What `nf4` says of a newcomer's mistakes, by what they are about. Made by
`python scripts/campaigns/newcomer_mistakes.py --write docs/messages.md`, which types each line in
a folder with a small model, some builds and what else lies about, against a Hub on this machine
(`HUB` below). The tests run the same list (`tests/campaigns/newcomer.py`), and of many a message
the line that it names as the way out.
"""
SECTIONS: Final = {
    "command": "Commands",
    "option": "Options",
    "model": "Models",
    "network": "Network",
    "Hub": "The Hub",
    "file": "Files",
    "artifact": "Builds and artifacts",
}
"""What the page calls a kind of mistake, in its order."""


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a pattern: of kinds and lines")
    parser.add_argument("--write", type=Path, help="the page to write")
    asked = parser.parse_args()
    rows: dict[str, list[str]] = {kind: [] for kind in SECTIONS}
    failed = 0
    with tempfile.TemporaryDirectory(prefix="nf4-newcomer-") as name, HubServer() as hub:
        folder = Path(name)
        model = write_falcon(folder / "made" / "model")
        recipe = write_recipe(folder / "made" / "recipe")
        build = folder / "made" / "build"
        done = nf4("build", model, "--recipe", recipe, "--build-dir", build, cwd=folder)
        assert done.status == 0, done.err
        place = make_place(folder / "place", model, build)
        serve(hub, model, build / "export")
        for mistake in MISTAKES:
            if not re.search(asked.only, f"{mistake.item}: {mistake.line}"):
                continue
            done = run_process(mistake, place, hub.url)
            faults = faults_of(mistake, done)
            failed += bool(faults)
            said = message(done).replace(str(place), "…").replace(name, "…").replace(hub.url, "HUB")
            print(f"{'FAULT' if faults else 'ok   '} {mistake.line}\n      {done.status}: {said}")
            for fault in faults:
                print(f"      -> {fault}", flush=True)
            rows[mistake.item].append(_row(mistake.shown, done.status, said))
    print(f"{sum(map(len, rows.values()))} mistakes, {failed} with a fault")
    if asked.write:
        asked.write.write_text(f"{HEAD}{_sections(rows)}", "utf-8")
    sys.exit(bool(failed))


def _sections(rows: Mapping[str, Sequence[str]]) -> str:
    head = "| typed | exit | said |\n| --- | --- | --- |\n"
    return "".join(
        f"\n## {SECTIONS[kind]}\n\n{head}{''.join(said)}" for kind, said in rows.items() if said
    )


def _row(line: str, status: int, said: str) -> str:
    cells = (f"`{line}`", str(status), " ".join(said.split()).removeprefix("Error: "))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    main()
