"""Mistakes of a newcomer: each message says what is wrong, why, and what to do next."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from tests.campaigns.newcomer import (
    MISTAKES,
    NOBODY,
    Mistake,
    cure_of,
    faults_of,
    make_place,
    run_process,
)
from tests.support.command_line import run_nf4

PROCESSES = {"HF_HUB_DOWNLOAD_TIMEOUT"}
"""Variables of mistakes that need a process of their own, and are quick; the campaign runs the
others, too."""


@pytest.fixture(scope="module")
def place(tiny_falcon: Path, verified: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("newcomer") / "place", tiny_falcon, verified)


def name_of(mistake: Mistake) -> str:
    return mistake.shown


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if not m.is_alone], ids=name_of)
def test_a_mistake(mistake: Mistake, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert faults_of(mistake, run_nf4(*mistake.args)) == []


@pytest.mark.parametrize(
    "mistake",
    [m for m in MISTAKES if m.line.startswith("make ") or set(m.variables) & PROCESSES],
    ids=name_of,
)
def test_a_mistake_in_the_environment(mistake: Mistake, place: Path) -> None:
    assert faults_of(mistake, run_process(mistake, place, NOBODY)) == []


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m.remedy], ids=name_of)
def test_what_a_message_names_helps(
    mistake: Mistake, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    line = cure_of(mistake, run_nf4(*mistake.args))
    assert line
    *before, last = line.split(" && ")
    for part in before:
        assert run_process(replace(mistake, line=part), place, NOBODY).status == 0
    if last.startswith("nf4 "):
        done = run_nf4(*shlex.split(last)[1:])
    else:
        done = run_process(replace(mistake, line=last), place, NOBODY)
    assert done.status == 0, done.err


def test_there_are_many() -> None:
    assert len({mistake.shown for mistake in MISTAKES}) == len(MISTAKES) >= 70
