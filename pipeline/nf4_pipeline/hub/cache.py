"""The user's Hub cache, as the client lays it out:

$HF_HOME/hub/models--ORG--NAME/
  blobs/<sha256 or git sha1>          the bytes, named by what the Hub lists
  snapshots/<commit>/<path>           links to blobs (copies, where there are no links)
  refs/<revision>                     the commit that a branch or tag had when last fetched

Somebody else may have prepared it. What is opened, replaced or deleted lies in it, with every link
followed: `check_links` before anything is written, `check_file` before a file is read, `discard` by
names alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.checkpoint.plain_file import open_plain, read_beginning, read_plain
from nf4_pipeline.errors import HubError
from nf4_pipeline.hub import replies
from nf4_pipeline.hub.remote import RemoteFile, RemoteModel
from nf4_pipeline.printable import printable

_LARGEST_TREE: Final = 64 << 20  # bytes of a listing that the client keeps


def storage(repo_id: str) -> Path:
    """The folder that holds all that is cached of a model repo; it may not exist yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / "--".join(["models", *repo_id.split("/")])


@contextmanager
def cache_at(folder: Path) -> Iterator[None]:
    """Downloads go to this folder, and not to the user's cache, while the body runs.

    The client looks its place up at each call. So this is for the whole process: one at a time.

    Args:
        folder: laid out as the user's cache is; made when something is fetched.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_CACHE
    constants.HF_HUB_CACHE = str(folder)
    try:
        yield
    finally:
        constants.HF_HUB_CACHE = before


def snapshot(repo_id: str, commit: str) -> Path:
    """The folder that looks like the repo at `commit`, as far as it was fetched."""
    return storage(repo_id) / "snapshots" / commit


def _root() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _leads_out(path: Path, folders: Sequence[Path]) -> bool:
    """Whether a path, with every link followed, ends in none of these folders."""
    end = os.path.realpath(path)
    return not any(
        end == real or end.startswith(real + os.sep) for real in map(os.path.realpath, folders)
    )


def _refuse(path: Path) -> HubError:
    return HubError(
        f"{printable(str(path))} is a link that leads out of the Hub cache. Remove it, or "
        "set HF_HOME to a cache of your own; a cache on another disk is named by HF_HOME, too."
    )


def check_links(model: RemoteModel, files: Sequence[RemoteFile]) -> None:
    """Looks at each place that a download of these files opens, replaces or deletes.

    Raises:
        HubError: one of these folders is a link out of the cache.
    """
    root, own = _root(), storage(model.repo_id)
    locks = root / ".locks" / own.name
    real = Path(os.path.realpath(root))
    for folder in (*_folders(model, files), root / "blobs", locks, root / "CACHEDIR.TAG"):
        if os.path.realpath(folder) != str(real / folder.relative_to(root)):
            raise _refuse(folder)
    for lock in locks.glob("*"):
        if lock.is_symlink():
            raise _refuse(lock)
    for file in files:
        check_file(snapshot(model.repo_id, model.commit) / file.path)
        if file.is_hashed:
            check_file(own / "blobs" / (file.sha256 or file.git_sha1 or ""))
    _drop_odd_listing(own / "trees" / f"{model.commit}.json")


def _folders(model: RemoteModel, files: Sequence[RemoteFile]) -> Iterator[Path]:
    own, folder = storage(model.repo_id), snapshot(model.repo_id, model.commit)
    yield from (own, own / "blobs", own / "snapshots", folder, own / "refs", own / "trees")
    yield from (own / ".no_exist", own / ".no_exist" / model.commit)
    for file in files:
        for parent in (folder / file.path).parents:
            if parent == folder:
                break
            yield parent


def _root_of(path: Path) -> tuple[Path, Path]:
    """The cache that holds a file of a snapshot, and the repo's part of it; not always the user's.

    A user may name a snapshot in any cache.
    """
    root = _root()
    if path.is_relative_to(root):
        return root, root / path.relative_to(root).parts[0]
    for parent in path.parents:
        if parent.name == "snapshots":
            return parent.parent.parent, parent.parent
    return path.parent, path.parent


def check_file(path: Path) -> None:
    """Looks at a file of the cache that is about to be read, if it is there.

    Raises:
        HubError: the file, or a folder on the way to it, is a link out of the repo's part of the
            cache; or the file is no plain one.
    """
    root, own = _root_of(path)
    if _leads_out(path, (own, root / "blobs")):
        raise _refuse(path)
    if path.exists() and not path.is_file():
        raise HubError(f"{printable(str(path))} is no plain file. Remove it.")


def _drop_odd_listing(path: Path) -> None:
    """Deletes a listing that the client would take hashes, and so paths, from, if it holds others.

    The client keeps one for each commit, for files of Xet repos, and reads it unchecked.
    """
    if not os.path.lexists(path):
        return
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _LARGEST_TREE:
            raise replies.ReplyError("no listing")
        for entry in json.loads(read_plain(path, _LARGEST_TREE))["files"].values():
            sha256 = entry.get("lfs_sha256")
            if sha256 is not None and not replies.SHA256.fullmatch(sha256):
                raise replies.ReplyError("no hash")
    except (replies.ReplyError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        if not path.is_dir():
            path.unlink(missing_ok=True)
    except OSError:
        pass  # what cannot be read here cannot be read by the client


def cached_commit(repo_id: str, revision: str) -> str | None:
    """The commit that the cache has for `revision`, if it has any file of it."""
    if not replies.is_revision(revision):
        return None
    own = storage(repo_id)
    ref = own / "refs" / revision
    commit = revision
    try:
        if ref.is_file():
            if _leads_out(ref, (own,)):
                return None
            commit = read_beginning(ref, 64).decode("ascii", "replace").strip()
        folder = snapshot(repo_id, commit)
        known = replies.COMMIT.fullmatch(commit) and folder.is_dir()
        return commit if known and not _leads_out(folder, (own,)) else None
    except OSError:
        return None


def cached_model(repo_id: str, revision: str) -> RemoteModel:
    """Lists the snapshot that the cache has for `revision`.

    The hashes are the names of the blobs, so that damage shows offline too.

    Raises:
        HubError: the cache has no snapshot for `revision`.
    """
    commit = cached_commit(repo_id, revision)
    if commit is None:
        raise HubError(
            f"offline, and {storage(repo_id)} holds no {repo_id}@{revision}: run once with a "
            "network and without HF_HUB_OFFLINE and --offline, name a local folder, or set HF_HOME "
            "to a cache that has it."
        )
    files = listed(snapshot(repo_id, commit))
    return RemoteModel(repo_id, commit, files, revision, offline=True)


def listed(snapshot: Path) -> tuple[RemoteFile, ...]:
    """What the Hub listed for the files of a snapshot, as far as the names of their blobs say."""
    paths = sorted(path for path in snapshot.rglob("*") if path.is_file())
    return tuple(_cached_file(path, path.relative_to(snapshot).as_posix()) for path in paths)


def _cached_file(path: Path, name: str) -> RemoteFile:
    try:
        replies.check_name(name)
    except replies.ReplyError as error:
        raise HubError(f"{printable(str(path.parent))}: the cache {error}") from None
    check_file(path)
    return _listed(path, name)


def _listed(path: Path, name: str) -> RemoteFile:
    """What the Hub listed of a file: its blob is named by its hash."""
    blob = path.readlink() if path.is_symlink() else Path()
    hashed = blob.name if blob.parent.name == "blobs" else ""
    sha256 = hashed if replies.SHA256.fullmatch(hashed) else None
    git_sha1 = hashed if replies.COMMIT.fullmatch(hashed) else None
    return RemoteFile(name, path.stat().st_size, sha256, git_sha1)


def are_blobs(folder: Path, files: Mapping[str, FileDigest]) -> bool:
    """Whether files of a snapshot hash to the names of their blobs, which are as the Hub lists.

    Args:
        folder: the snapshot.
        files: digest of each file.
    """
    for name, digest in files.items():
        listed = _listed(folder / name, name)
        if listed.sha256 == digest.sha256:
            continue
        if listed.git_sha1 is None or listed.git_sha1 != _git_sha1(folder / name, digest.size):
            return False
    return True


def _git_sha1(path: Path, size: int) -> str:
    found = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open_plain(path) as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    return found.hexdigest()


def is_cached(model: RemoteModel, file: RemoteFile) -> bool:
    """Whether a file's bytes are here already, for this commit or for another one."""
    blob = storage(model.repo_id) / "blobs" / (file.sha256 or file.git_sha1 or "")
    return blob.is_file() or (snapshot(model.repo_id, model.commit) / file.path).exists()


def remember(model: RemoteModel) -> None:
    """Lets `model.revision` mean this commit from now on, for offline use.

    The client does so when it is given a branch; it was given a commit. A read-only cache stays as
    it is.
    """
    if model.offline or model.revision is None or model.revision == model.commit:
        return
    ref = storage(model.repo_id) / "refs" / model.revision
    if not replies.is_revision(model.revision) or _leads_out(ref.parent, (storage(model.repo_id),)):
        return
    try:
        if cached_commit(model.repo_id, model.revision) != model.commit:
            ref.parent.mkdir(parents=True, exist_ok=True)
            fresh = ref.with_name(f"{ref.name}.{uuid.uuid4().hex[:8]}.tmp")
            fresh.write_text(model.commit)
            fresh.replace(ref)
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError):
        pass  # read-only, or a branch of this name does not go beside one that was fetched before


def purge_leftovers(repo_id: str) -> None:
    """Deletes half files that killed downloads left behind; one being written to is locked.

    The client gives each a name of its own, so it never takes one up again.
    """
    from huggingface_hub.utils._fixes import WeakFileLock

    folder = storage(repo_id)
    for leftover in (folder / "blobs").glob("*.incomplete"):
        lock = folder.parent / ".locks" / folder.name / f"{leftover.name.partition('.')[0]}.lock"
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock, timeout=0.01):
                leftover.unlink(missing_ok=True)
        except OSError:
            pass  # somebody is at it (a TimeoutError), or the cache is read-only


def discard(path: Path) -> None:
    """Takes a snapshot's file and its bytes out of the cache.

    It goes by names: the bytes are those of the repo's `blobs/<hash>`, or of the cache's own
    `blobs/<xx>/<hash>` where that one is a link to it. No other link is followed.

    Raises:
        HubError: a folder on the way to the file is a link out of the cache.
    """
    root, own = _root_of(path)
    if _leads_out(path.parent, (own,)):
        raise _refuse(path.parent)
    if path.is_symlink():
        blob = own / "blobs" / path.readlink().name
        target = path.parent / path.readlink()
        is_own = os.path.realpath(target.parent) == os.path.realpath(blob.parent)
        if is_own and replies.HASH.fullmatch(blob.name) and not _leads_out(blob.parent, (own,)):
            _discard_shared(blob, root)
            blob.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _discard_shared(blob: Path, root: Path) -> None:
    """Deletes the file that several repos share, if this is a link to one."""
    if not blob.is_symlink():
        return
    name = blob.readlink().name
    shared = root / "blobs" / name[:2] / name
    is_shared = os.path.realpath(blob) == os.path.realpath(shared)
    if replies.SHA256.fullmatch(name) and is_shared and not _leads_out(shared, (root / "blobs",)):
        shared.unlink(missing_ok=True)
