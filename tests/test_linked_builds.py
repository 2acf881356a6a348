"""A build folder from somebody else: what is a link in it leads nowhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.errors import BuildError

FOLDERS = (
    *("source", "quantized", "export", "records", "calibration", "converted"),
    *(".export.partial", "..export-old.partial.partial", "anything", "export/pictures"),
    *("records/.x.partial", "calibration/.blocks.partial", "source/additional_chat_templates"),
)


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder of the user, with names in it that builds use."""
    folder = tmp_path / "precious"
    (folder / ".old.partial").mkdir(parents=True)
    for name in ("a.txt", ".a.partial", ".old.partial/b", "model.safetensors", "download.json"):
        (folder / name).write_text("mine")
    return folder


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("lead", [str, lambda path: f"../{path.name}", lambda path: "."])
def test_a_folder(name: str, lead: Callable[[Path], str], precious: Path, tmp_path: Path) -> None:
    link = tmp_path / "build" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    up = "../" * name.count("/")
    link.symlink_to(lead(precious) if lead is str else up + lead(precious))
    before = _content(precious)
    with pytest.raises(BuildError, match="is a link, and a build works only in its own folder"):
        _use(tmp_path / "build")
    assert _content(precious) == before


@pytest.mark.parametrize("target", ["a.txt", "none.txt", "", "/dev/null"])
def test_its_lock(target: str, precious: Path, tmp_path: Path) -> None:
    build = tmp_path / "build"
    build.mkdir()
    (build / ".lock").symlink_to(precious / target)
    before = _content(precious)
    with pytest.raises(BuildError, match="is a link, and a build works only in its own folder"):
        _use(build)
    assert _content(precious) == before


def test_a_build_that_is_named_by_a_link(precious: Path, tmp_path: Path) -> None:
    """That link is the user's own word."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "build").symlink_to(tmp_path / "disk")
    _use(tmp_path / "build")
    assert (tmp_path / "disk" / ".lock").is_file()


def _use(root: Path) -> None:
    with Build(root).locked():
        pass
