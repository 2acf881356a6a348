"""Temporary folders: each is locked while its process lives, and goes when it does not.

A process that is killed cannot delete what it or its child left. The next one does: a folder with
the right name, of this user, that nobody holds a lock on and that is no longer new.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
import weakref
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal, get_args

Use = Literal["child", "look", "scores", "reproduce", "rebuild", "sign", "stream", "task"]
"""What a folder is for; it stands in its name."""

_NEW_SECONDS: Final = 60
"""A folder so young may be about to be locked."""


class TemporaryFolder:
    """A locked folder in the system's place for temporary files; it goes at the latest at exit.

    A context manager whose value is the path. The first one of a process removes what killed ones
    left.

    Args:
        use: what it is for.
    """

    def __init__(self, use: Use) -> None:
        _remove_abandoned_once()
        self.path = Path(tempfile.mkdtemp(prefix=_prefix(use)))
        lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._finalizer = weakref.finalize(self, _remove, self.path, lock, os.getpid())
        with suppress(OSError):  # a file system without locks: then nobody can tell, and none is
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Deletes it and lets the lock go; a second call does nothing."""
        self._finalizer()


def _remove(path: Path, lock: int, of: int) -> None:
    if of == os.getpid():  # a fork leaves it to whom it belongs
        shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def remove_abandoned() -> None:
    """Deletes folders whose process died; what is not this user's, or is no folder, is left."""
    place = Path(tempfile.gettempdir())
    for path in (path for use in get_args(Use) for path in place.glob(f"{_prefix(use)}*")):
        with suppress(OSError):
            found = path.lstat()
            old = time.time() - max(found.st_mtime, found.st_ctime) > _NEW_SECONDS
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and old:
                _remove_if_free(path)


@lru_cache(maxsize=1)
def _remove_abandoned_once() -> None:
    remove_abandoned()


def _prefix(use: Use) -> str:
    return f"nf4-{use}-"


def _remove_if_free(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)
