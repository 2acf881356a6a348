"""Builds of two recipes, each killed again and again: both are there and right at the end."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.build_folder import Build

from tests.support.folder_state import content, false_records, leftovers
from tests.support.killed_builds import killed_builds

RECIPES: Final[list[dict[str, Any]]] = [{}, {"quantize": {"skip_modules": ["h.0"]}}]
KILLS: Final = 12
STEP: Final = 5  # changes on the disk between the moments of two kills; a build makes some 60


def test_two_recipes_in_turn_killed_at_twelve_moments(tiny_falcon: Path, tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    with killed_builds(tiny_falcon) as builds:
        names = []
        for recipe in RECIPES:
            status, changes = builds.build(tmp_path / "undisturbed", recipe)
            assert status == 0
            assert changes > KILLS * STEP - STEP
            names += [p.name for p in (tmp_path / "undisturbed").iterdir() if p.name not in names]
        expected = [content(Build(tmp_path / "undisturbed" / name)) for name in names]
        assert expected[0] != expected[1]

        kills = turns = 0
        while kills < KILLS:
            mine, other = turns % 2, 1 - turns % 2
            root, beside = artifacts / names[mine], artifacts / names[other]
            before = content(Build(beside))
            status, _ = builds.build(artifacts, RECIPES[mine], kill_at=1 + STEP * kills)
            assert content(Build(beside)) == before
            assert {path.name for path in artifacts.glob("*")} <= {*names}
            assert false_records(Build(root)) == []
            if status == 0:  # what earlier runs had done left too little to do: from the beginning
                assert content(Build(root)) == expected[mine]
                shutil.rmtree(root)
                continue
            assert status == -signal.SIGKILL
            kills += 1
            turns += 1
        for recipe in reversed(RECIPES):
            assert builds.build(artifacts, recipe)[0] == 0
    for name, files in zip(names, expected, strict=True):
        build = Build(artifacts / name)
        assert content(build) == files
        assert leftovers(build) == []
        assert false_records(build) == []
