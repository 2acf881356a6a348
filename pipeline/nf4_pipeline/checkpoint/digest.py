"""sha256 of files, of the tensors in them (in one reading), and of plain JSON."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.plain_file import open_plain
from nf4_pipeline.checkpoint.safetensors_header import HeaderTensor
from nf4_pipeline.documents import Document
from nf4_pipeline.progress import Task

_CHUNK: Final = 4 * 2**20


@dataclass(frozen=True, slots=True)
class FileDigest(Document):
    """A file's size and sha256 (hex)."""

    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> FileDigest:
        """Of a file that holds just these bytes."""
        return cls(len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True, slots=True)
class FileStamp(Document):
    """What a file cannot keep when other bytes are put into it; of a link, that of its target.

    A time of change (ctime) cannot be set, so a kept time of modification hides nothing. That two
    stamps are equal may save work; a claim is made only of bytes that were hashed.

    Attributes:
        size: in bytes.
        mtime_ns: time of modification.
        ctime_ns: time of change, of the bytes or of what the system keeps beside them.
        inode: which file it is.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        """As it is now."""
        now = path.stat()
        return cls(now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino)


def content_sha256(files: Mapping[str, FileDigest]) -> str:
    """One hash over files: sha256 of the sorted lines `sha256  name`.

    As `sha256sum` writes them: a line whose name holds a newline, a carriage return or a backslash
    begins with a backslash, and these are written as two characters. So no name can stand for two
    files, and the text can be checked by `sha256sum --check`.
    """
    lines = sorted(_checksum_line(digest.sha256, name) for name, digest in files.items())
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


_ESCAPES: Final = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r"})


def _checksum_line(sha256: str, name: str) -> str:
    escaped = name.translate(_ESCAPES)
    return f"{'' if escaped == name else chr(92)}{sha256}  {escaped}\n"


def digests_json(digests: Mapping[str, FileDigest]) -> dict[str, dict[str, int | str]]:
    """Digests as plain JSON, by name."""
    return {name: digest.to_json() for name, digest in sorted(digests.items())}


def json_sha256(value: Any) -> str:
    """sha256 (hex) of plain JSON values; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path, task: Task | None = None) -> FileDigest:
    """Hashes a whole file.

    Raises:
        UnfitFileError: the path leads to something else than a plain file.
        OSError: the file cannot be read, or grows while it is read.
    """
    whole = hashlib.sha256()
    size = 0
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with open_plain(path) as file:
        end = os.fstat(file.fileno()).st_size
        while count := file.readinto(buffer):
            whole.update(view[:count])
            size += count
            if size > end:
                raise OSError(errno.EIO, "it grew while it was read", str(path))
            if task:
                task.advance(count)
    return FileDigest(size, whole.hexdigest())


def digest_files(paths: Mapping[str, Path], task: Task) -> dict[str, FileDigest]:
    """Hashes files, several at a time; an error or an interrupt ends all of them at once."""
    stop = threading.Event()

    class Watched:
        def advance(self, amount: int) -> None:
            if stop.is_set():
                raise InterruptedError
            task.advance(amount)

    with ThreadPoolExecutor() as pool:
        try:
            digests = [pool.submit(digest_file, path, Watched()) for path in paths.values()]
            return {name: one.result() for name, one in zip(paths, digests, strict=True)}
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def digest_tensors(
    path: Path, tensors: Sequence[HeaderTensor], task: Task | None = None
) -> tuple[FileDigest, dict[str, str]]:
    """Hashes a safetensors file and each of its tensors, reading every byte once.

    Args:
        path: the file.
        tensors: all of its tensors, in the order of their bytes.
        task: told how many bytes of them are hashed.

    Returns:
        The file's digest, and the sha256 of each tensor's bytes by name.

    Raises:
        UnfitFileError: the path leads to something else than a plain file.
        OSError: the file cannot be read, or becomes shorter while it is read.
    """
    whole = hashlib.sha256()
    by_name: dict[str, str] = {}
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        data_start = tensors[0].offset if tensors else size
        whole.update(file.read(data_start))
        for tensor in tensors:
            one = hashlib.sha256()
            left = tensor.nbytes
            while left:
                count = file.readinto(view[: min(left, _CHUNK)])
                if not count:
                    raise OSError(f"{path} became shorter while it was read")
                whole.update(view[:count])
                one.update(view[:count])
                left -= count
                if task:
                    task.advance(count)
            by_name[tensor.name] = one.hexdigest()
    return FileDigest(size, whole.hexdigest()), by_name
