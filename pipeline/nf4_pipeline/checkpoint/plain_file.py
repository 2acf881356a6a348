"""Reading a file that somebody else names or makes: a plain file, of a size that is known first.

A pipe would be waited for, a device never ends, and a sparse file of some bytes on disk fills the
memory. So the kind and the size are asked before the first byte is read, and no more is read than
was asked about.
"""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Final

from nf4_pipeline.errors import UnfitFileError

_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
"""Without waiting: what was a file a moment ago may be a pipe now."""

_KINDS: Final = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_plain(path: Path, limit: int | None = None) -> int:
    """The size of a plain file, for what will be read by others than this module.

    Args:
        path: of the file; links are followed.
        limit: bytes that it may have; None for any number.

    Raises:
        UnfitFileError: the path leads to something else than a plain file, or to a file with more
            than `limit` bytes.
        OSError: there is no such file, or the system does not show it.
    """
    return _check(path, path.stat(), limit)


def open_plain(path: Path, limit: int | None = None) -> BufferedReader:
    """Opens a plain file for reading.

    Args:
        path: of the file; links are followed.
        limit: bytes that it may have; None for any number.

    Raises:
        UnfitFileError: the path leads to something else than a plain file, or to a file with more
            than `limit` bytes.
        OSError: there is no such file, or it cannot be opened.
    """
    check_plain(path, limit)  # to open a device may already do something
    descriptor = os.open(path, _FLAGS)
    try:
        _check(path, os.fstat(descriptor), limit)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_plain(path: Path, limit: int) -> bytes:
    """The whole of a plain file.

    Args:
        path: of the file; links are followed.
        limit: bytes that it may have.

    Raises:
        UnfitFileError: the path leads to something else than a plain file, or the file has more
            than `limit` bytes, or gets them while it is read.
        OSError: there is no such file, or it cannot be read.
    """
    content = read_beginning(path, limit + 1, limit)
    if len(content) > limit:
        raise _unfit(path, f"it grew beyond {limit:,} bytes while it was read")
    return content


def read_text(path: Path, limit: int) -> str:
    """The whole of a plain file as text, its line breaks as Python has them.

    Args:
        path: of the file; links are followed.
        limit: bytes that it may have.

    Raises:
        UnfitFileError: the path leads to something else than a plain file, or the file has more
            than `limit` bytes, or gets them while it is read.
        OSError: there is no such file, or it cannot be read.
        UnicodeDecodeError: the file is not UTF-8.
    """
    text = read_plain(path, limit).decode("utf-8-sig")  # with a mark, as Windows writes it, or not
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_beginning(path: Path, nbytes: int, limit: int | None = None) -> bytes:
    """The first bytes of a plain file, or all of a shorter one.

    Args:
        path: of the file; links are followed.
        nbytes: how many to read.
        limit: bytes that the file may have; None for any number.

    Raises:
        UnfitFileError: the path leads to something else than a plain file, or to a file with more
            than `limit` bytes.
        OSError: there is no such file, or it cannot be read.
    """
    with open_plain(path, limit) as file:
        return file.read(nbytes)


def why_unreadable(error: OSError | UnicodeDecodeError) -> str:
    """The reason alone, to follow "PATH cannot be read: "."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 ({error.reason} at byte {error.start:,}); save it as UTF-8"
    return error.strerror or str(error)


def _unfit(path: Path, why: str) -> UnfitFileError:
    return UnfitFileError(f"{path} cannot be read: {why}. Name or bring the file itself.", why)


def _check(path: Path, found: os.stat_result, limit: int | None) -> int:
    for is_kind, name in _KINDS:
        if is_kind(found.st_mode):
            raise _unfit(path, f"it is {name}, not a plain file")
    if limit is not None and found.st_size > limit:
        raise _unfit(path, f"it has {found.st_size:,} bytes; no real one has more than {limit:,}")
    return found.st_size
