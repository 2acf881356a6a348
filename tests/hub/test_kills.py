"""SIGKILL in the middle, then again: a short run of scripts/campaigns/hub_kills.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.hub_kills import COMMANDS, campaign


@pytest.mark.parametrize("command", COMMANDS)
def test_what_was_killed_ends_right_when_run_again(
    command: str, tiny_falcon: Path, verified: Path, tmp_path: Path
) -> None:
    download = command == "download"
    source = tiny_falcon if download else verified
    found = campaign(command, 2 if download else 4, 1, source, tmp_path, holds=True)
    assert [trial.problems for trial in found if trial.problems] == []
    assert not all(trial.was_over for trial in found)
