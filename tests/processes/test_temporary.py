"""What killed parents leave is removed by the next one, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from nf4_pipeline.processes import temporary
from nf4_pipeline.processes.temporary import TemporaryFolder, remove_abandoned

PROGRAM = """
import os, signal
from nf4_pipeline.processes.temporary import TemporaryFolder
folder = TemporaryFolder("child")
(folder.path / "left").write_text("x")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(temporary, "IN_MEMORY", tmp_path)
    return tmp_path


def killed(place: Path) -> Path:
    """A folder whose parent was killed."""
    environment = {**os.environ, "TMPDIR": str(place)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    (folder,) = place.glob("nf4-child-*")
    return folder


def test_what_a_killed_parent_left_goes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = killed(place)
    remove_abandoned()
    assert left.exists()  # it may be about to be locked
    monkeypatch.setattr(temporary, "_NEW_SECONDS", -1)
    remove_abandoned()
    assert list(place.iterdir()) == []


def test_of_one_owner_nothing_is_left(place: Path) -> None:
    """Memory may not hold it twice, however soon the next process comes; others' folders stay."""
    program = PROGRAM.replace('TemporaryFolder("child")', 'TemporaryFolder("child", None, "me")')
    environment = {**os.environ, "TMPDIR": str(place)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    others = TemporaryFolder("child", place, "another")
    (left,) = set(place.iterdir()) - {others.path}
    with TemporaryFolder("child", place, "me") as folder:
        assert not left.exists()
        assert set(place.iterdir()) == {others.path, folder}


def test_what_is_in_use_or_not_ours_stays(
    place: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temporary, "_NEW_SECONDS", -1)
    used = TemporaryFolder("child")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "kept").write_text("x")
    (place / "nf4-child-link").symlink_to(elsewhere)
    (place / "nf4-child-file").write_text("x")
    (place / "nf4-other-x").mkdir()
    left = place / "nf4-child-left"
    left.mkdir()
    (left / "link").symlink_to(elsewhere)
    remove_abandoned()
    assert not left.exists()
    assert (elsewhere / "kept").exists()
    assert sorted(path.name for path in place.iterdir()) == sorted(
        [used.path.name, "nf4-child-link", "nf4-child-file", "nf4-other-x"]
    )
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    (place / "nf4-child-of-somebody").mkdir()
    remove_abandoned()
    assert (place / "nf4-child-of-somebody").exists()
    used.remove()
    used.remove()
    assert not used.path.exists()
