"""Damage to an export, every kind to every file, and what each command says of it.

    python scripts/campaigns/damage.py

Prints the table of docs/reliability.md. Exits 1 if a command said "ok" of something damaged, or if
`nf4 build` did not make it what it was. Five minutes on two cores.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[2]))

import pytest
from nf4_pipeline.job import run_stage
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe, load_recipe

from tests.support.damage import ASKED, DAMAGES, ask_all, make_signed
from tests.support.jobs import CPU, download
from tests.support.tiny import write_falcon, write_recipe
from tests.support.verified import skip_documents, skip_readers

_KIND: Final = {"ArtifactError": "refused", "again": "mended"}


def main() -> int:
    """Runs all cases."""
    wrong = 0
    print(f"| damage | files | {' | '.join(ASKED)} |")
    print("| --- " * (2 + len(ASKED)) + "|")
    with (
        tempfile.TemporaryDirectory(prefix="nf4-damage-") as temporary,
        in_process(),
        pytest.MonkeyPatch.context() as patch,
    ):
        skip_documents(patch)
        skip_readers(patch)
        folder = Path(temporary)
        model = write_falcon(folder / "model")
        build, *_ = download(model, folder / "artifacts")
        for stage in ("quantize", "serialize"):
            run_stage(build, stage, Recipe(), CPU, SILENT)
        recipe = load_recipe(write_recipe(folder / "recipe"))
        signed = make_signed(build.root, model, recipe, folder / "signed")
        for kind, (_, files) in DAMAGES.items():
            said = [ask_all(signed, folder / "case", kind, name) for name in files]
            cells = []
            for command in ASKED:
                seen = sum(one[command] != "ok" for one in said)
                wrong += len(files) - seen
                how = Counter(
                    _KIND.get(one[command], one[command].partition(":")[0]) for one in said
                )
                detail = ", ".join(f"{count} {word}" for word, count in sorted(how.items()))
                plain = command in ("status", "push", "check")
                cells.append(f"{seen} of {len(files)}" if plain else detail)
            print(f"| {kind} | {len(files)} | {' | '.join(cells)} |", flush=True)
    print(f"\n{wrong} times ok")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
