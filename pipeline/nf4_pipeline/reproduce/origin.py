"""Where a manifest says that its source is from: confirmed by somebody else, or not checked.

That the source's files hash as the manifest lists them says nothing of the repo and the commit that
it names. Those are confirmed by what a Hub lists at that commit, or by the Hub cache, whose blobs
are named by what a Hub listed once; against either, every file is held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nf4_pipeline.checkpoint.folder_advice import cache_commit
from nf4_pipeline.checkpoint.model_name import is_hub_id
from nf4_pipeline.documents import Document
from nf4_pipeline.errors import HubError, SourceError, UsageError
from nf4_pipeline.hub.local import LocalFile
from nf4_pipeline.hub.remote import RemoteFile
from nf4_pipeline.manifest.manifest import Source
from nf4_pipeline.sample import SAMPLE_REPO


@dataclass(frozen=True)
class Origin(Document):
    """How far a source's repo and commit are known to be what the manifest says.

    Attributes:
        claimed: false for the name of a local folder: nobody can mean anything by it, and the hash
            of the content says all.
        confirmed_by: who says so, too; None if nobody was found who does.
        not_checked: why not; None if it is confirmed.
    """

    claimed: bool = field(default=True, kw_only=True)
    confirmed_by: str | None = None
    not_checked: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether something is claimed that could not be checked."""
        return self.claimed and self.confirmed_by is None


def check_origin(
    source: Source, files: Mapping[str, LocalFile], folder: Path | None, *, is_sample: bool
) -> Origin:
    """Asks who else says that these files are of that repo at that commit.

    Args:
        source: what is claimed of repo and commit.
        files: those of them that a Hub would know, as they were hashed.
        folder: that the user has named; None if the files came from the claimed commit on the Hub.
        is_sample: the files are those of the sample that comes with this package.

    Raises:
        SourceError: the Hub, or the Hub cache, lists other bytes at that commit.
    """
    from huggingface_hub import constants

    if source.commit is None:
        return _without_commit(source, is_sample)
    if folder is None and not constants.HF_HUB_OFFLINE:
        # Fetched a moment ago from that commit, and held against what is listed there.
        return Origin(f"the Hub at {constants.ENDPOINT}")
    if not is_hub_id(source.repo) or "--" in source.repo:
        return Origin(not_checked=f"{source.repo!r} is not the name of a Hub repo")
    other = None
    if folder is not None:
        by, other = _named_snapshot(folder, source, files)
        if by is not None:
            return Origin(by)
    return _known_snapshot(source, files) or _on_the_hub(source, files, folder, other)


def _without_commit(source: Source, is_sample: bool) -> Origin:
    if source.repo == SAMPLE_REPO and is_sample:
        return Origin("the sample that comes with this version of nf4-pipeline")
    if source.repo == SAMPLE_REPO:
        return Origin(not_checked="the sample of this version of nf4-pipeline has other content")
    if "/" in source.repo:
        return Origin(not_checked="it names a repo and no commit of it")
    return Origin(not_checked="it is the name of a local folder", claimed=False)


def _named_snapshot(
    folder: Path, source: Source, files: Mapping[str, LocalFile]
) -> tuple[str | None, str | None]:
    """The folder itself as a snapshot in a Hub cache: who confirms it, or what it is instead."""
    from nf4_pipeline.hub import cache

    found = cache_commit(folder.resolve())
    if found is None:
        return None, f"{folder} is no snapshot in a Hub cache"
    repo, commit = found
    if (repo, commit) != (source.repo, source.commit):
        return None, f"{folder} is a snapshot of {repo} at {commit}"
    lacking = _not_listed(cache.listed(folder.resolve()), files)
    if lacking:
        return None, f"{folder} does not say what the Hub listed for {lacking[0]}"
    return f"the Hub cache, {folder}", None


def _known_snapshot(source: Source, files: Mapping[str, LocalFile]) -> Origin | None:
    """The user's own Hub cache, if it has the commit."""
    from nf4_pipeline.hub import cache

    snapshot = cache.snapshot(source.repo, source.commit or "")
    if not snapshot.is_dir():
        return None
    listed = cache.listed(snapshot)
    _refuse_others(f"The Hub cache ({snapshot})", listed, files)
    return None if _not_listed(listed, files) else Origin(f"the Hub cache, {snapshot}")


def _on_the_hub(
    source: Source, files: Mapping[str, LocalFile], folder: Path | None, other: str | None
) -> Origin:
    from huggingface_hub import constants

    from nf4_pipeline import hub

    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set, and the Hub cache does not have that commit"
        return Origin(not_checked="; ".join(part for part in (other, why) if part))
    try:
        # Tried again at once: a user who named a folder may well have no network.
        model = hub.resolve(source.repo, source.commit, offline=False, sleep=lambda seconds: None)
    except (HubError, UsageError) as error:
        return Origin(not_checked="; ".join(part for part in (other, str(error)) if part))
    where = f"{constants.ENDPOINT}/{source.repo} at {model.commit}"
    if model.commit != source.commit:
        raise SourceError(
            f"The manifest says that the source is {source.repo} at {source.commit}; the Hub knows "
            f"that as {where}. Take the manifest from where the artifact was published."
        )
    _refuse_others(where, model.files, files, complete=True)
    return Origin(f"the Hub at {constants.ENDPOINT}")


def _not_listed(listed: Sequence[RemoteFile], files: Mapping[str, LocalFile]) -> list[str]:
    """Files for which a listing has no checksum, or another one."""
    by_path = {file.path: file for file in listed}
    return [
        name
        for name, file in files.items()
        if not _has_checksum(by_path.get(name)) or not file.equals(by_path[name])
    ]


def _has_checksum(file: RemoteFile | None) -> bool:
    return file is not None and bool(file.sha256 or file.git_sha1)


def _refuse_others(
    where: str,
    listed: Sequence[RemoteFile],
    files: Mapping[str, LocalFile],
    *,
    complete: bool = False,
) -> None:
    """Refuses a source of which somebody lists other bytes at the claimed commit.

    Args:
        where: who lists.
        listed: what.
        files: of the source.
        complete: a file that is not listed is not in the commit.
    """
    by_path = {file.path: file for file in listed}
    for name, file in files.items():
        remote = by_path.get(name)
        if remote is None and not complete:
            continue
        if remote is not None and (not _has_checksum(remote) or file.equals(remote)):
            continue
        has = "no such file" if remote is None else f"{remote.size:,} bytes, "
        if remote is not None:
            has += f"sha256 {remote.sha256}" if remote.sha256 else f"git sha1 {remote.git_sha1}"
        raise SourceError(
            f"{where} has another {name} than the source that the manifest pins: expected "
            f"{file.size:,} bytes with sha256 {file.sha256}, found {has}. The manifest's repo or "
            "commit is wrong; take it from where the artifact was published."
        )
