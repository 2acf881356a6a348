"""Git LFS pointers: texts of some 130 bytes that stand for files which git did not fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from nf4_pipeline.checkpoint.plain_file import read_beginning
from nf4_pipeline.errors import CheckpointError

_LARGEST: Final = 1024  # bytes; git-lfs itself takes nothing longer for a pointer
_FIRST_LINES: Final = (
    b"version https://git-lfs.github.com/spec/",
    b"version https://hawser.github.com/spec/",
    b"version http://git-media.io/v/",
    b"# xet version ",
)


def is_lfs_pointer(path: Path) -> bool:
    """True if a file is a pointer of Git LFS (or of git-xet) and not what its name says."""
    if not path.is_file() or path.stat().st_size > _LARGEST:
        return False
    return read_beginning(path, _LARGEST).startswith(_FIRST_LINES)


def check_no_pointer(path: Path) -> None:
    """Refuses a pointer.

    Raises:
        CheckpointError: the file is a Git LFS pointer.
    """
    if is_lfs_pointer(path):
        raise CheckpointError(
            f"{path} is a Git LFS pointer of {path.stat().st_size} bytes, not the file itself: the "
            "repository was cloned without git-lfs. Run `git lfs install && git lfs pull` in "
            f"{path.parent}, then this again."
        )
