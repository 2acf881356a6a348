"""What a command that fails must say, and what it must not leave."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.command_line import without_progress
from tests.support.tiny import Done


def check_message(done: Done, status: int, *patterns: str) -> None:
    """One message beside progress, with every pattern in it; no traceback, nothing on stdout."""
    assert done.status == status, done.err
    assert "Traceback" not in done.err
    lines = [line for line in without_progress(done.err).splitlines() if line.strip()]
    assert len(lines) == 1, done.err
    assert lines[0].startswith("Error: ")
    for pattern in patterns:
        assert re.search(pattern, lines[0]), (pattern, lines[0])
    assert done.out == ""


def check_nothing_written(folder: Path) -> None:
    """No build folder at all."""
    assert not (folder / "artifacts").exists()
    assert not list(folder.rglob("*.partial"))
