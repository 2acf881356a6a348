"""The objects below a URL: each complete or absent, checked by size and hash."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
import time
import uuid
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

from nf4_pipeline.checkpoint.atomic import PARTIAL_SUFFIX, replacing, write_at
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.errors import PipelineError, StoreError
from nf4_pipeline.object_store.address import (
    S3,
    check_url,
    is_object_store,
    open_filesystem,
    protocols,
)
from nf4_pipeline.object_store.faults import lost, passes, refusal, trying_again
from nf4_pipeline.progress import SILENT_TASK, HighWaterTask, Task

PATIENCE = 120.0
"""Seconds for which a call is tried again that failed for a reason that may pass."""

_FIRST_WAIT: Final = 0.5  # seconds
_LONGEST_WAIT: Final = 15.0  # seconds
_SILENCE: Final = 30.0  # seconds between two words about an outage
_PIECE: Final = 8 * 2**20
_PART: Final = 16 * 2**20
"""Bytes of one part of an upload to S3; its client keeps some of them in memory."""

_PROBE: Final = ".nf4-probe-"

T = TypeVar("T")


class ObjectStore:
    """The objects below a URL. Safe from several threads.

    Args:
        url: of a folder.
        patience: seconds for which a call is tried again; None for the usual ones.

    Raises:
        UsageError: no build can be kept there.
    """

    def __init__(self, url: str, patience: float | None = None) -> None:
        self.url = check_url(url)
        self.stop = threading.Event()  # whoever waits for a store gives up
        self.say: Callable[[str], None] = lambda text: None  # hears of calls that are tried again
        self._said = -_SILENCE
        self._patience = PATIENCE if patience is None else patience
        self._opening = threading.Lock()

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        return open_filesystem(self.url)

    def _at(self, name: str) -> tuple[Any, str]:
        with self._opening:
            filesystem, folder = self._opened
        return filesystem, f"{folder}/{name}" if name else folder

    def names(self) -> dict[str, int]:
        """The size of every object below the URL, by its name there.

        Raises:
            StoreError: the store refuses, or does not answer.
        """
        filesystem, folder = self._at("")

        def find() -> dict[str, Any]:
            filesystem.invalidate_cache()
            found: dict[str, Any] = filesystem.find(folder, detail=True)
            return found

        sizes = {}
        for path, info in self._call("list what is there", find).items():
            name = path.removeprefix(folder).lstrip("/")
            last = name.rpartition("/")[2]
            if not last or last.startswith(_PROBE) or last.endswith(PARTIAL_SUFFIX):
                continue
            sizes[name] = int(info["size"] or 0)
        return sizes

    def check_writable(self) -> None:
        """Writes and deletes an object, so that hours of work do not end with a refusal.

        Raises:
            StoreError: the store refuses, or does not answer.
        """
        name = f"{_PROBE}{uuid.uuid4().hex}"
        self.write(name, b"nf4-pipeline was here\n")
        self.delete(name)

    def read(self, name: str, limit: int) -> bytes | None:
        """The content of a small object; None if there is none, or a larger one.

        Args:
            name: of the object.
            limit: bytes that it may have.

        Raises:
            StoreError: the store refuses, or does not answer.
        """
        filesystem, path = self._at(name)

        def read() -> bytes | None:
            try:
                if filesystem.info(path)["size"] > limit:
                    return None
                content: bytes = filesystem.cat_file(path)
                return content
            except FileNotFoundError:
                return None

        return self._call(f"read {name}", read)

    def write(self, name: str, content: bytes, *, new: bool = False) -> bool:
        """Writes a small object, complete or not at all.

        Args:
            name: of the object.
            content: of it.
            new: only if there is none; S3 decides that in one step.

        Returns:
            False if it had to be new, and another stands there.

        Raises:
            StoreError: the store refuses, or does not answer.
        """
        filesystem, path = self._at(name)

        def put() -> bool:
            try:
                if new and self._create(path, content):
                    return True
                if new and filesystem.exists(path):
                    raise FileExistsError
                self._place(path, lambda target: filesystem.pipe_file(target, content))
            except FileExistsError:
                # Of a try whose answer was lost, the object is ours.
                return bool(filesystem.cat_file(path) == content)
            return True

        return self._call(f"write {name}", put)

    def _create(self, path: str, content: bytes) -> bool:
        """Writes an object if there is none, in one step; False where a store cannot do that.

        Raises:
            FileExistsError: an object of that name stands there.
        """
        filesystem, _ = self._opened
        if not is_object_store(filesystem):
            return False
        try:
            filesystem.pipe_file(path, content, mode="create")
        except OSError as error:
            if error.errno == errno.ENOSYS:
                return False
            raise
        return True

    def put(self, name: str, path: Path, digest: FileDigest) -> None:
        """Puts a file there, complete or not at all, and looks at what came of it.

        Args:
            name: of the object.
            path: of the file.
            digest: of its bytes.

        Raises:
            StoreError: the store refuses, does not answer, or holds something else afterwards.
        """
        filesystem, target = self._at(name)
        options: dict[str, Any] = {}
        if protocols(filesystem) & set(S3):
            options = {
                "Metadata": {"sha256": digest.sha256},
                "chunksize": _PART,
                "max_concurrency": 2,
            }
        self._call(
            f"write {name}",
            lambda: self._place(
                target, lambda place: filesystem.put_file(str(path), place, **options)
            ),
        )
        if not self.holds(name, digest):
            raise StoreError(
                f"{self.url}/{name} is not what was put there: expected {digest.size:,} bytes with "
                f"sha256 {digest.sha256[:12]}…. Does another program write there? Run the same "
                "command again."
            )

    def _place(self, path: str, write: Callable[[str], Any]) -> None:
        """Writes an object in its place, or beside it where it would be seen half written."""
        filesystem, _ = self._opened
        if is_object_store(filesystem):
            write(path)
            return
        folder, _, last = path.rpartition("/")
        filesystem.makedirs(folder, exist_ok=True)
        partial = f"{folder}/.{last}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}"
        try:
            write(partial)
            filesystem.mv(partial, path)
        except BaseException:
            if filesystem.exists(partial):
                filesystem.rm_file(partial)
            raise

    def holds(self, name: str, digest: FileDigest) -> bool:
        """Whether an object stands there that was put there as these bytes.

        Its size is compared everywhere, and its hash where stores keep one beside it (S3). Its
        bytes are only read by `get`.

        Args:
            name: of the object.
            digest: of its bytes.

        Raises:
            StoreError: the store refuses, or does not answer.
        """
        filesystem, path = self._at(name)

        def look() -> bool:
            try:
                if not protocols(filesystem) & set(S3):
                    return bool(filesystem.info(path)["size"] == digest.size)
                bucket, key, _ = filesystem.split_path(path)
                head = filesystem.call_s3("head_object", Bucket=bucket, Key=key)
            except FileNotFoundError:
                return False
            found = head["ContentLength"], head["Metadata"].get("sha256")
            return bool(found == (digest.size, digest.sha256))

        return self._call(f"look at {name}", look)

    def get(self, name: str, target: Path, digest: FileDigest, task: Task | None = None) -> bool:
        """Fetches an object into a file, hashed on the way: complete and right, or not at all.

        Args:
            name: of the object.
            target: the file.
            digest: what it must have.
            task: advanced by the bytes that came.

        Returns:
            False if there is none.

        Raises:
            StoreError: the store refuses or does not answer, or the object has other bytes; such
                an object is deleted, so that the next run makes it anew.
        """
        filesystem, path = self._at(name)
        shown = HighWaterTask(task or SILENT_TASK, digest.size)

        def fetch() -> FileDigest | None:
            shown.restart()
            try:
                if filesystem.info(path)["size"] != digest.size:
                    return FileDigest(-1, "")
            except FileNotFoundError:
                return None
            whole, size = hashlib.sha256(), 0
            with (
                replacing(target) as descriptor,
                filesystem.open(path, "rb", block_size=_PIECE, cache_type="readahead") as file,
            ):
                while piece := file.read(_PIECE):
                    whole.update(piece)
                    write_at(descriptor, memoryview(piece), size)
                    size += len(piece)
                    shown.advance(len(piece))
                found = FileDigest(size, whole.hexdigest())
                if found != digest:
                    raise _OtherBytes
            return found

        try:
            found = self._call(f"fetch {name}", fetch)
        except _OtherBytes:
            found = FileDigest(-1, "")
        if found is None:
            return False
        if found != digest:
            self.delete(name)
            raise StoreError(
                f"{self.url}/{name} did not have the {digest.size:,} bytes with sha256 "
                f"{digest.sha256[:12]}… that were put there. It was deleted: run `nf4 build` "
                "again, which makes it anew."
            )
        return True

    def copy(self, name: str, target: str) -> bool:
        """Gives an object a second name; the store does it, and no bytes come here.

        Args:
            name: of the object.
            target: the other name.

        Returns:
            False if there is no such object.

        Raises:
            StoreError: the store refuses, or does not answer.
        """
        filesystem, source = self._at(name)
        path = self._at(target)[1]

        def copy() -> bool:
            try:
                self._place(path, lambda place: filesystem.cp_file(source, place))
            except FileNotFoundError:
                return False
            return True

        return self._call(f"copy {name}", copy)

    def delete(self, name: str) -> None:
        """Deletes an object, if it is there.

        Raises:
            StoreError: the store refuses, or does not answer.
        """
        filesystem, path = self._at(name)

        def remove() -> None:
            try:
                filesystem.rm_file(path)
            except FileNotFoundError:
                return

        self._call(f"delete {name}", remove)

    def _call(self, doing: str, call: Callable[[], T]) -> T:
        """Calls the client; again, after longer and longer waits, while a fault may pass."""
        began, wait = time.monotonic(), _FIRST_WAIT
        while True:
            try:
                return call()
            except (PipelineError, _OtherBytes):
                raise
            except Exception as error:
                if (refused := refusal(error, self.url, doing)) is not None:
                    raise refused from error
                if not passes(error):
                    raise
                tried = time.monotonic() - began
                if time.monotonic() - self._said >= _SILENCE:
                    self._said = time.monotonic()
                    self.say(trying_again(error, self.url, doing))
                if tried + wait > self._patience or self.stop.wait(wait):
                    raise lost(error, self.url, doing, tried) from error
            wait = min(2 * wait, _LONGEST_WAIT)


class _OtherBytes(Exception):
    """An object has not the bytes that were put there."""


def read_json(content: bytes | None) -> Any:
    """What JSON of a store says; None if it cannot be read."""
    try:
        return None if content is None else json.loads(content)
    except (ValueError, RecursionError):
        return None
