"""Download never touches what is not its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from nf4_pipeline.errors import UsageError

from tests.support.jobs import download
from tests.support.tiny import content_of, copy_of

pytestmark = pytest.mark.usefixtures("workers_here")


def test_a_source_inside_the_build_folder_is_refused_and_left_alone(
    tiny_falcon: Path, tmp_path: Path
) -> None:
    model = copy_of(tiny_falcon, tmp_path / "project" / "source")
    before = content_of(model)
    with pytest.raises(UsageError, match="cannot be the build folder"):
        download(model, tmp_path, build_dir=tmp_path / "project")
    assert content_of(model) == before


def test_a_folder_with_an_export_of_somebody_else_is_refused(
    tiny_falcon: Path, tmp_path: Path
) -> None:
    (tmp_path / "project" / "export").mkdir(parents=True)
    (tmp_path / "project" / "export" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not part of a build"):
        download(tiny_falcon, tmp_path, build_dir=tmp_path / "project")
    assert (tmp_path / "project" / "export" / "thesis.txt").read_text() == "mine"
