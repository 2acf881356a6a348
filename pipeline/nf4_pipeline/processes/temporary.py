"""Temporary folders: each is locked while its process lives, and goes when it does not.

A process that is killed cannot delete what it or its child left. The next one does: a folder with
the right name, of this user, that nobody holds a lock on and that is no longer new.
"""

from __future__ import annotations

import fcntl
import hashlib
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

IN_MEMORY: Final = Path("/dev/shm")
"""A place for files that no disk gets; it is not everywhere."""

_NEW_SECONDS: Final = 60
"""A folder so young may be about to be locked."""


class TemporaryFolder:
    """A locked folder in the system's place for temporary files; it goes at the latest at exit.

    A context manager whose value is the path. The first one of a process removes what killed ones
    left.

    Args:
        use: what it is for.
        place: where it is made; None for the system's place.
        owner: of whom only one folder is there at a time: what a killed process left for it goes at
            once. Empty if there may be several.
    """

    def __init__(self, use: Use, place: Path | None = None, owner: str = "") -> None:
        _remove_abandoned_once()
        if owner:
            own = hashlib.sha256(owner.encode()).hexdigest()[:16]
            prefix = f"{_prefix(use)}{own}-"
            _remove_left(place or Path(tempfile.gettempdir()), prefix)
        else:
            prefix = _prefix(use)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
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
    for place in {Path(tempfile.gettempdir()), IN_MEMORY}:
        for use in get_args(Use):
            _remove_left(place, _prefix(use), _NEW_SECONDS)


def _remove_left(place: Path, prefix: str, age: float = -1.0) -> None:
    """Deletes folders that nobody holds a lock on.

    Args:
        place: where they are.
        prefix: of their names.
        age: seconds for which nothing happened in them, at least.
    """
    for path in place.glob(f"{prefix}*"):
        with suppress(OSError):
            found = path.lstat()
            old = time.time() - max(found.st_mtime, found.st_ctime) > age
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
