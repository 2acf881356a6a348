"""Which commit, and what is in it: asked of the Hub, or of the cache when offline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from nf4_pipeline.errors import UsageError
from nf4_pipeline.hub import cache, client, replies
from nf4_pipeline.hub.errors import Request
from nf4_pipeline.hub.remote import RemoteFile, RemoteModel


def resolve(
    repo_id: str,
    revision: str | None = None,
    *,
    offline: bool | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> RemoteModel:
    """Pins `revision` (default: main) to a commit and lists its files with sizes and hashes.

    With `offline` (default: HF_HUB_OFFLINE) the local cache answers, and the result says so.
    Without it the Hub does, or nobody: what the cache happens to hold is never taken instead.

    Args:
        repo_id: `ORG/NAME`.
        revision: branch, tag, or commit.
        offline: whether the cache answers.
        sleep: waits between tries, in seconds.

    Raises:
        NotFoundError: the Hub has no such repo or revision, or the token has no access to it.
        HubError: the Hub refuses or does not answer, or, offline, the cache holds no such snapshot.
        UsageError: `repo_id` cannot be the name of a repo, or `revision` that of a branch.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UsageError(f"{repo_id!r} is no Hub model id: expected ORG/NAME") from None
    revision = revision or constants.DEFAULT_REVISION
    if not replies.is_revision(revision):
        raise UsageError(f"{replies.shown(revision)} is no branch, tag or commit")
    if constants.HF_HUB_OFFLINE if offline is None else offline:
        return cache.cached_model(repo_id, revision)

    api = HfApi(library_name=client.LIBRARY)
    request = Request(repo_id, revision, f"looking up {repo_id}@{revision}")
    with client.quiet():
        info = client.attempt(lambda: api.model_info(repo_id, revision=revision), request, sleep)
        # The client has seen what `replies` let through, but not what it makes of it.
        commit = info.sha or ""

        def listed() -> list[RemoteFile]:
            replies.check_commit(commit)
            entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
            files = [_remote_file(entry) for entry in entries if isinstance(entry, RepoFile)]
            replies.check_listing(file.path for file in files)
            return files

        files = client.attempt(listed, request, sleep, delays=client.ONCE_MORE)
    ordered = tuple(sorted(files, key=lambda f: f.path))
    return RemoteModel(repo_id, commit, ordered, revision, private=bool(info.private))


def _remote_file(entry: Any) -> RemoteFile:
    """What is used of the client's RepoFile; a hash that is none is "" there (`replies`)."""
    if entry.lfs:
        return RemoteFile(entry.path, entry.lfs.size, entry.lfs.sha256 or None, None)
    return RemoteFile(entry.path, entry.size, None, entry.blob_id or None)
