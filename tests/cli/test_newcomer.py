"""Mistakes of a newcomer: each message says what is wrong, why, and what to do next."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.newcomer import MISTAKES, NOBODY, Mistake, faults_of, make_place, run_process
from tests.support.command_line import run_nf4

PROCESSES = ("make quantize MODEL=", "HF_HUB_DOWNLOAD_TIMEOUT")
"""Of those that need a process of their own, and are quick; the campaign runs the others, too."""


@pytest.fixture(scope="module")
def place(tiny_falcon: Path, verified: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("newcomer") / "place", tiny_falcon, verified)


def name_of(mistake: Mistake) -> str:
    return mistake.line


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if not m.is_alone], ids=name_of)
def test_a_mistake(mistake: Mistake, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert faults_of(mistake, run_nf4(*mistake.args)) == []


@pytest.mark.parametrize(
    "mistake",
    [m for m in MISTAKES if m.line in PROCESSES or set(m.variables) & set(PROCESSES)],
    ids=name_of,
)
def test_a_mistake_in_the_environment(mistake: Mistake, place: Path) -> None:
    assert faults_of(mistake, run_process(mistake, place, NOBODY)) == []


def test_there_are_many() -> None:
    assert len({mistake.line for mistake in MISTAKES}) == len(MISTAKES) >= 70
