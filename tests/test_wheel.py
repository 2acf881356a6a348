"""The wheel holds every file of the package: code, schemas, texts, templates, the sample."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
PACKAGE: Final = "pipeline/nf4_pipeline"
BESIDE: Final = ("pyproject.toml", "README.md", "LICENSE")


def package_files() -> list[str]:
    """Files of the package that git knows, or would if they were added."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("which files belong to the package is asked of git")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", PACKAGE]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file())


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    files = package_files()
    for name in (*files, *BESIDE):  # a copy, so that building leaves nothing in the project
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / "copy" / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    command = [*pip, "--no-index", "--wheel-dir", str(tmp_path), str(tmp_path / "copy")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("nf4_pipeline-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(held) == [name.removeprefix("pipeline/") for name in files]
