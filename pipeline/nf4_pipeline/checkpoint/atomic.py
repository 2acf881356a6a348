"""Files that are complete or absent.

The order is write, fsync, rename, fsync of the folder: after a crash at any moment the name either
does not exist or stands for the whole file. A folder is filled beside its place, and takes it at
once.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.errors import AccessError

PARTIAL_SUFFIX: Final = ".partial"

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2  # renameat2(2)
_SYNC_FILE_RANGE_WRITE: Final = 2  # sync_file_range(2)
_NO_FSYNC: Final = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say of a folder that keep no names back, or cannot be asked to write them."""
_TAKES_NONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)
"""What is said of a new folder where none can ever be made, or not by this user."""
_sync_file_range: Any = getattr(_LIBC, "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """Opens a file beside `path` and gives its descriptor; `path` is replaced if the body succeeds.

    If the body raises, nothing is left behind and an earlier file of that name is untouched.
    """
    make_folder(path.parent)
    partial = partial_of(path)
    partial.unlink(missing_ok=True)  # a link in its place would be written through
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # calls on descriptors do not know it
        raise
    sync_folder(path.parent)


def partial_of(path: Path) -> Path:
    """Where a file or a folder is made before it takes its place."""
    return path.with_name(f".{path.name}{PARTIAL_SUFFIX}")


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, so that they survive a crash."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def check_can_be_made(folder: Path) -> None:
    """Tries whether a folder can be made; leaves nothing.

    Raises:
        AccessError: no folder can be made there, as below a file or under /proc, or not by this
            user.
    """
    above = folder.absolute()
    while not os.path.lexists(above):
        above = above.parent
    if above == folder.absolute():
        return
    tried = above / f".nf4_{os.getpid()}_{threading.get_ident()}"
    try:
        tried.mkdir(exist_ok=True)
        tried.rmdir()
    except OSError as error:
        if error.errno not in _TAKES_NONE:
            raise
        if not above.is_dir():
            why = (
                f"{above} is no folder, but a file" if above.is_file() else f"{above} is no folder"
            )
            remedy = "Name"
        elif error.errno in (errno.EACCES, errno.EPERM):
            why = f"this user may not write in {above}"
            remedy = "Give the user the right to it, or name"
        else:
            why, remedy = f"{above} takes no folders ({error.strerror})", "Name"
            if str(above).startswith(("/proc", "/sys", "/dev")):
                why = f"{above} belongs to the system, and takes no folders"
        raise AccessError(
            f"{folder} cannot be made: {why}. {remedy} another --build-dir, such as artifacts/mine."
        ) from error


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder beside `folder`, and puts it in its place if the body succeeds.

    What is written there must be synced by who writes it. At no moment is there half of a folder:
    where the system can exchange two names there is always one of the two, and elsewhere none for
    an instant. If the body raises, nothing is left behind and an earlier folder is untouched.
    """
    partial = partial_of(folder)
    if partial.exists():
        shutil.rmtree(partial)
    make_folder(partial)
    try:
        yield partial
        if not _exchange(partial, folder):
            old = _old(folder)
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
            partial = old
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _old(folder: Path) -> Path:
    return partial_of(folder.with_name(f"{folder.name}-old"))


def recover_folder(folder: Path) -> None:
    """Undoes what a `replacing_folder` left half done that was killed."""
    old = _old(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (old, partial_of(folder)):
        if leftover.exists():
            shutil.rmtree(leftover)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names at once; False if one is absent or the system cannot."""
    call: Any = getattr(_LIBC, "renameat2", None)
    if call is None or not other.exists():
        return False
    done = call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(done == 0)


def start_writing_out(descriptor: int, offset: int, nbytes: int) -> None:
    """Asks the system to write a finished range out now, so that fsync has less to wait for.

    A hint: where the system has no such call (it is Linux's own), nothing happens.
    """
    if _sync_file_range is not None:
        _sync_file_range(descriptor, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at a place of a file; one call of the system may take less."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a crash, where the file system can be asked to."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a small file, complete or not at all."""
    with replacing(path) as descriptor:
        write_at(descriptor, memoryview(content), 0)


def json_bytes(value: Any) -> bytes:
    """JSON as this project stores it: UTF-8, two spaces, a final newline, keys in given order."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, complete or not at all."""
    write_bytes(path, json_bytes(value))


def link_or_copy(source: Path, target: Path) -> bool:
    """Gives `source` a second name without a second copy of its bytes where the disk allows it.

    Returns:
        True if a hard link was made, False if the bytes had to be copied.
    """
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        with replacing(target) as descriptor, source.open("rb") as file:
            offset = 0
            while chunk := file.read(8 * 2**20):
                write_at(descriptor, memoryview(chunk), offset)
                offset += len(chunk)
        return False
    sync_folder(target.parent)
    return True


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed writer left in a folder and in those below it; links stay."""
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if name.startswith(".") and name.endswith(PARTIAL_SUFFIX):
                leftover = Path(parent, name)
                if leftover.is_dir() and not leftover.is_symlink():
                    shutil.rmtree(leftover)
                    folders.remove(name)
                else:
                    leftover.unlink()
