"""Brings files into the Hub cache, and lets none pass that is not what the Hub lists."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from nf4_pipeline.checkpoint.digest import FileStamp
from nf4_pipeline.checkpoint.files import PICKLE_FILE
from nf4_pipeline.checkpoint.untrusted import size_limit
from nf4_pipeline.errors import HubError, ResourceError
from nf4_pipeline.hub import cache, client, replies
from nf4_pipeline.hub.client import StoppedTransfer
from nf4_pipeline.hub.remote import RemoteFile, RemoteModel
from nf4_pipeline.progress import HighWaterTask, Reporter, Task
from nf4_pipeline.resource_usage import free_space

T = TypeVar("T")

_WORKERS = 4  # files at a time
_CHUNK = 4 << 20  # bytes hashed at a time
_MOST_SMALL = 500  # files beside the weights; each takes two requests
_SMALL_BYTES = 1 << 30  # of all of them


@dataclass(frozen=True)
class Fetched:
    """A snapshot folder in the Hub cache, and the sha256 of each file asked for, by its path.

    `stamps` are from before they were hashed. `unchecked` names those of them that the Hub lists no
    hash for: they are what came, and whether that is right nobody knows.
    """

    folder: Path
    sha256: dict[str, str]
    stamps: dict[str, FileStamp]
    unchecked: tuple[str, ...] = ()


class _Hashed(NamedTuple):
    """A file's sha256, and its stamp from before it was hashed."""

    sha256: str
    stamp: FileStamp


def fetch(
    model: RemoteModel,
    files: Sequence[RemoteFile],
    reporter: Reporter,
    *,
    allow_unhashed: bool = False,
    last: bool = True,
    sleep: Callable[[float], None] = time.sleep,
) -> Fetched:
    """Brings `files` into the user's Hub cache at the pinned commit and hashes every one of them.

    A file with wrong bytes, one that was cached before included, is fetched again once. Only when
    all are there and right does the cache's ref of `model.revision` move to this commit.

    Args:
        model: from `resolve`.
        files: what to fetch of it, as a rule `wanted_files(model)`; none only moves the ref.
        reporter: gets two tasks in bytes, "download" and "check".
        allow_unhashed: take files without a hash to check them by, too; the result names them.
        last: no more files of this commit will be asked for; only then the ref moves.
        sleep: waits between tries, in seconds.

    Raises:
        HubError: the Hub refuses a file or does not answer, or sent wrong bytes for one twice (it
            is then out of the cache); a file has no hash, and that is not allowed; files beside the
            weights are larger, or more, than those of any real model; or the cache leads out of its
            own folder.
        ResourceError: the disk of the cache has no room for the files that are missing.
    """
    unchecked = _check_files(model, files, allow_unhashed)
    for path in unchecked:
        reporter.note(f"{path}: there is no hash to check it by, as --allow-unhashed allows")
    cache.check_links(model, files)
    folder = cache.snapshot(model.repo_id, model.commit)
    if not model.offline:
        cache.purge_leftovers(model.repo_id)
    _check_disk(model, files)
    if model.offline and last:
        reporter.note(f"offline: {model.repo_id} at commit {model.commit}, as cached in {folder}")

    def download(file: RemoteFile, gauge: _Gauge) -> None:
        if not model.offline and not (folder / file.path).exists():
            client.download(model, file, gauge, sleep)

    def check(file: RemoteFile, gauge: _Gauge) -> _Hashed:
        return _hash_or_fetch_again(model, file, folder / file.path, gauge, reporter, sleep)

    hashes = []
    if files:
        with client.quiet():
            _in_threads("download", download, files, reporter)
            hashes = _in_threads("check", check, files, reporter)
    if last:
        cache.remember(model)
    hashed = dict(zip((file.path for file in files), hashes, strict=True))
    return Fetched(
        folder,
        {path: one.sha256 for path, one in hashed.items()},
        {path: one.stamp for path, one in hashed.items()},
        unchecked,
    )


def _check_files(
    model: RemoteModel, files: Sequence[RemoteFile], allow_unhashed: bool
) -> tuple[str, ...]:
    """Names those without a hash; refuses them, and names that cannot be in one folder."""
    try:
        for file in files:
            replies.check_name(file.path)
        replies.check_listing(file.path for file in files)
        replies.check_cases(file.path for file in files)
        replies.check_commit(model.commit)
    except replies.ReplyError as error:
        raise HubError(f"{model.repo_id}: the Hub {error}") from None
    _check_small(model, files)
    unchecked = tuple(file.path for file in files if not file.is_hashed)
    if unchecked and not allow_unhashed:
        named = ", ".join(unchecked[:3]) + (", …" if unchecked[3:] else "")
        who = "the cache knows" if model.offline else "the Hub lists"
        raise HubError(
            f"{model.repo_id}@{model.commit[:12]}: {who} no hash of {named}, so nothing can tell "
            "whether the bytes are right. Take another source, or say --allow-unhashed."
        )
    return unchecked


def _check_small(model: RemoteModel, files: Sequence[RemoteFile]) -> None:
    """Refuses files beside the weights that are larger, or more, than those of any real model."""
    small = [f for f in files if not f.path.endswith(".safetensors")]
    small = [file for file in small if not PICKLE_FILE.fullmatch(file.path)]
    where = f"{model.repo_id}@{model.commit[:12]}"
    for file in small:
        limit = size_limit(file.path)
        if file.size > limit:
            raise HubError(
                f"{where}: {file.path} is listed with {file.size:,} bytes; no real one has more "
                f"than {limit:,}. Nothing of it was fetched. Take another source."
            )
    total = sum(file.size for file in small)
    if len(small) > _MOST_SMALL or total > _SMALL_BYTES:
        raise HubError(
            f"{where} lists {len(small):,} files beside its weights, with {total:,} bytes; no real "
            f"model has more than {_MOST_SMALL:,}, with {_SMALL_BYTES:,}. Take another source."
        )


def _check_disk(model: RemoteModel, files: Sequence[RemoteFile]) -> None:
    folder = cache.storage(model.repo_id)
    missing = sum(file.size for file in files if not cache.is_cached(model, file))
    free = free_space(folder)
    if missing > free:
        raise ResourceError(
            f"{folder}: the download needs {missing:,} bytes, and {free:,} are free. "
            "Make room, or set HF_HOME to a folder on a larger disk."
        )


def _hash_or_fetch_again(
    model: RemoteModel,
    file: RemoteFile,
    path: Path,
    gauge: _Gauge,
    reporter: Reporter,
    sleep: Callable[[float], None],
) -> _Hashed:
    """Hashes a file that is what the Hub lists; if it is not, fetches it once more."""
    hashed, wrong = _compare(path, file, gauge)
    if wrong and model.offline:
        raise HubError(
            f"{path}: {wrong}. The cached file is damaged: run once without HF_HUB_OFFLINE."
        )
    if wrong:
        reporter.note(f"{file.path}: {wrong}; fetching it again")
        client.download(model, file, gauge, sleep, force=True)
        hashed, wrong = _compare(path, file, gauge)
    if wrong or hashed is None:
        cache.discard(path)
        raise HubError(
            f"{file.path} of {model.repo_id}@{model.commit[:12]} came wrong twice: {wrong}. The "
            "cache keeps none of it. Look for a proxy or mirror that alters files, or try later."
        )
    return hashed


def _compare(path: Path, file: RemoteFile, gauge: _Gauge) -> tuple[_Hashed | None, str | None]:
    """Hashes a file and, unless it is what the Hub lists, says what differs."""
    gauge.restart()
    if not path.is_file():
        return None, f"expected {file.size:,} bytes, got no file"
    cache.check_file(path)
    stamp = FileStamp.of(path)
    if stamp.size != file.size:
        return None, f"expected {file.size:,} bytes, got {stamp.size:,}"
    sha256, git_sha1 = file_digests(path, git=file.git_sha1 is not None, advance=gauge.advance)
    if file.sha256 not in (None, sha256):
        return None, f"expected sha256 {file.sha256}, got {sha256}"
    if file.git_sha1 != git_sha1:
        return None, f"expected git sha1 {file.git_sha1}, got {git_sha1}"
    return _Hashed(sha256, stamp), None


def file_digests(
    path: Path, *, git: bool = False, advance: Callable[[int], None] = lambda _: None
) -> tuple[str, str | None]:
    """Hashes a file in one pass: sha256 and, with `git`, the sha1 of its git blob (both hex)."""
    sha256 = hashlib.sha256()
    sha1 = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False) if git else None
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK):
            sha256.update(chunk)
            if sha1:
                sha1.update(chunk)
            advance(len(chunk))
    return sha256.hexdigest(), sha1.hexdigest() if sha1 else None


class _Gauge(HighWaterTask):
    """One file's part of a task."""

    def __init__(self, task: Task, size: int, stop: threading.Event) -> None:
        super().__init__(task, size)
        self._stop = stop

    def advance(self, amount: int) -> None:
        if self._stop.is_set():
            raise StoppedTransfer
        super().advance(amount)


def _in_threads(
    title: str,
    work: Callable[[RemoteFile, _Gauge], T],
    files: Sequence[RemoteFile],
    reporter: Reporter,
) -> list[T]:
    """Works on a few files at a time; the first failure, or an interrupt, ends the others too."""
    stop = threading.Event()
    with reporter.task(title, sum(file.size for file in files)) as task:

        def one(file: RemoteFile) -> T:
            gauge = _Gauge(task, file.size, stop)
            result = work(file, gauge)
            gauge.advance(file.size)
            return result

        pool = ThreadPoolExecutor(_WORKERS)
        try:
            futures = [pool.submit(one, file) for file in files]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
