"""Builds of two recipes, each killed again and again: both are there and right at the end."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.object_store import ObjectStore
from nf4_pipeline.records import QUANTIZE, SERIALIZE

from tests.support.folder_state import content, false_records, leftovers
from tests.support.killed_builds import KilledBuilds, killed_builds
from tests.support.stores import fresh_url

RECIPES: Final[list[dict[str, Any]]] = [{}, {"quantize": {"skip_modules": ["h.0"]}}]
KILLS: Final = 20
STEP: Final = 3  # changes on the disk between the moments of two kills; a build makes some 60


@pytest.fixture(scope="module")
def builds(tiny_falcon: Path) -> Iterator[KilledBuilds]:
    with killed_builds(tiny_falcon) as builds:
        yield builds


def test_two_recipes_in_turn_killed_at_twenty_moments(builds: KilledBuilds, tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
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


def test_each_time_another_machine_goes_on_with_what_stands_at_the_url(
    builds: KilledBuilds, tmp_path: Path
) -> None:
    """A driver killed at any change, here or in the store; the next one begins with no disk."""
    status, changes = builds.build(tmp_path / "undisturbed", {}, url=fresh_url("file", tmp_path))
    assert status == 0
    expected = content(Build(tmp_path / "undisturbed" / "copy"))
    url = fresh_url("file", tmp_path)
    kills = 0
    for number, moment in enumerate(sorted(random.Random(7).sample(range(5, changes), 6))):
        status, _ = builds.build(tmp_path / f"machine-{number}", {}, moment, url)
        kills += status == -signal.SIGKILL
    assert kills >= 3  # the last ones find too little left to do
    assert builds.build(tmp_path / "last", {}, url=url)[0] == 0
    last = Build(tmp_path / "last" / "copy")
    for kind in (QUANTIZE, SERIALIZE):
        last.fetch(kind)
    assert content(last) == expected
    assert not [name for name in ObjectStore(url).names() if "partial" in name]
