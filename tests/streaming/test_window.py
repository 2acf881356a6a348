"""What leaves the spool, and how much of it there is (builds: `stages/test_streamed_source.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from nf4_pipeline.streaming.window import _drop, window_bytes


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ([5], 5),
        ([5, 3, 4], 8),
        ([5, 7, 4, 6], 12),
        ([10, 4], 10),
        ([4, 10, 2, 3], 12),
        ([13, 14], 14),
    ],
)
def test_how_much_lies_there_at_a_time(sizes: list[int], most: int) -> None:
    """Two files, if they are at most 12 GB together."""
    assert window_bytes([size * 10**9 for size in sizes]) == most * 10**9


@pytest.mark.parametrize("linked", [True, False], ids=["links", "copies"])
def test_files_of_the_same_bytes(linked: bool, tmp_path: Path) -> None:
    """The bytes go with the last of them; where there are no links, each has its own."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "c"
    blobs.mkdir()
    folder.mkdir(parents=True)
    blob = blobs / "hash"
    blob.write_bytes(b"weights")
    files = [folder / "one", folder / "two"]
    for file in files:
        if linked:
            file.symlink_to(f"../../blobs/{blob.name}")
        else:
            file.write_bytes(b"weights")
    _drop(files[0])
    assert files[1].read_bytes() == b"weights"
    _drop(files[1])
    assert not list(folder.iterdir())
    assert blob.exists() is not linked
