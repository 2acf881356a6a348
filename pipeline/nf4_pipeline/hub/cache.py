"""The user's Hub cache, as the client lays it out:

$HF_HOME/hub/models--ORG--NAME/
  blobs/<sha256 or git sha1>          the bytes, named by what the Hub lists
  snapshots/<commit>/<path>           links to blobs (copies, where there are no links)
  refs/<revision>                     the commit that a branch or tag had when last fetched
"""

from __future__ import annotations

import re
import uuid
from pathlib import Path

from nf4_pipeline.errors import HubError
from nf4_pipeline.hub.remote import RemoteFile, RemoteModel


def storage(repo_id: str) -> Path:
    """The folder that holds all that is cached of a model repo; it may not exist yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / "--".join(["models", *repo_id.split("/")])


def snapshot(repo_id: str, commit: str) -> Path:
    """The folder that looks like the repo at `commit`, as far as it was fetched."""
    return storage(repo_id) / "snapshots" / commit


def cached_commit(repo_id: str, revision: str) -> str | None:
    """The commit that the cache has for `revision`, if it has any file of it."""
    ref = storage(repo_id) / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    known = re.fullmatch("[0-9a-f]{40}", commit) and snapshot(repo_id, commit).is_dir()
    return commit if known else None


def cached_model(repo_id: str, revision: str) -> RemoteModel:
    """Lists the snapshot that the cache has for `revision`.

    The hashes are the names of the blobs, so that damage shows offline too.

    Raises:
        HubError: the cache has no snapshot for `revision`.
    """
    commit = cached_commit(repo_id, revision)
    if commit is None:
        raise HubError(
            f"offline, and {storage(repo_id)} holds no {repo_id}@{revision}: run once without "
            "HF_HUB_OFFLINE, or set HF_HOME to a cache that has it."
        )
    files = listed(snapshot(repo_id, commit))
    return RemoteModel(repo_id, commit, files, revision, offline=True)


def listed(snapshot: Path) -> tuple[RemoteFile, ...]:
    """What the Hub listed for the files of a snapshot, as far as the names of their blobs say."""
    paths = sorted(path for path in snapshot.rglob("*") if path.is_file())
    return tuple(_cached_file(path, path.relative_to(snapshot).as_posix()) for path in paths)


def as_snapshot(folder: Path) -> tuple[str, str] | None:
    """Of a folder that is a snapshot in some Hub cache: `models--ORG--NAME`, and the commit."""
    path = folder.resolve()
    known = (
        re.fullmatch("[0-9a-f]{40}", path.name)
        and path.parent.name == "snapshots"
        and path.parent.parent.name.startswith("models--")
        and (path.parent.parent / "blobs").is_dir()
    )
    return (path.parent.parent.name, path.name) if known else None


def _cached_file(path: Path, name: str) -> RemoteFile:
    blob = path.readlink().name if path.is_symlink() else ""
    sha256 = blob if re.fullmatch("[0-9a-f]{64}", blob) else None
    git_sha1 = blob if re.fullmatch("[0-9a-f]{40}", blob) else None
    return RemoteFile(name, path.stat().st_size, sha256, git_sha1)


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
    try:
        if not ref.is_file() or ref.read_text() != model.commit:
            ref.parent.mkdir(parents=True, exist_ok=True)
            fresh = ref.with_name(f"{ref.name}.{uuid.uuid4().hex[:8]}.tmp")
            fresh.write_text(model.commit)
            fresh.replace(ref)
    except PermissionError:
        pass


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
    """Takes a snapshot's file and its bytes out of the cache."""
    if path.is_symlink():
        path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
