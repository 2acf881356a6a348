"""A published artifact: what it lists, and files of it, brought and hashed."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import quote

from nf4_pipeline import hub
from nf4_pipeline.checkpoint.atomic import make_folder
from nf4_pipeline.checkpoint.digest import FileDigest, content_sha256, digest_file
from nf4_pipeline.checkpoint.files import entries
from nf4_pipeline.checkpoint.model_name import at_revision, check_hub_id, model_path
from nf4_pipeline.errors import HubError
from nf4_pipeline.manifest.read import MANIFEST_FILE
from nf4_pipeline.progress import Reporter
from nf4_pipeline.provenance.identifiers import model_purl

_PUBLIC_HUB: Final = "https://huggingface.co"
_BESIDE_A_DOWNLOAD: Final = (".git/", ".cache/huggingface/")
"""What git and the Hub's client leave in a folder that they fill."""


@dataclass(frozen=True)
class Listed:
    """One file of an artifact, before a byte of it is read.

    Attributes:
        size: in bytes.
        sha256: that the Hub lists.
        git_sha1: that the Hub lists.
        problem: why it is no file that could be read; "" if it is one.
    """

    size: int
    sha256: str | None = None
    git_sha1: str | None = None
    problem: str = ""

    @property
    def digest(self) -> dict[str, str]:
        """As a statement has it; empty where nobody said."""
        if self.sha256 is not None:
            return {"sha256": self.sha256}
        return {} if self.git_sha1 is None else {"gitBlob": self.git_sha1}


class Published(Protocol):
    """An artifact that somebody published, or is about to."""

    @property
    def commit(self) -> str | None:
        """Of its repo; None for a folder."""

    @property
    def repo_id(self) -> str | None:
        """Of the Hub; None for a folder."""

    @property
    def files(self) -> Mapping[str, Listed]:
        """All that it holds, by path."""

    @property
    def folder(self) -> Path:
        """Where files are once they were brought, and nothing else of it."""

    def bring(self, names: Collection[str], reporter: Reporter) -> dict[str, FileDigest]:
        """Brings files, and hashes them.

        Raises:
            HubError: the Hub does not give a file, or gives other bytes than it lists.
            ResourceError: the disk has no room for the files.
        """

    def uri(self, digests: Mapping[str, FileDigest]) -> str:
        """Its package URL, which pins all that it holds."""

    def subjects(self, digests: Mapping[str, FileDigest]) -> tuple[dict[str, Any], ...]:
        """All that it holds, as the subjects of a statement."""


@dataclass(frozen=True)
class HubArtifact:
    """A repo of the Hub at a commit."""

    model: hub.RemoteModel

    @property
    def commit(self) -> str | None:
        return self.model.commit

    @property
    def repo_id(self) -> str | None:
        return self.model.repo_id

    @property
    def files(self) -> Mapping[str, Listed]:
        return {f.path: Listed(f.size, f.sha256, f.git_sha1) for f in self.model.files}

    @property
    def folder(self) -> Path:
        return hub.snapshot(self.model.repo_id, self.model.commit)

    def bring(self, names: Collection[str], reporter: Reporter) -> dict[str, FileDigest]:
        fetched = hub.fetch(self.model, hub.named(self.model, names), reporter, last=False)
        return {
            name: FileDigest(fetched.stamps[name].size, sha256)
            for name, sha256 in fetched.sha256.items()
        }

    def uri(self, digests: Mapping[str, FileDigest]) -> str:
        from huggingface_hub import constants

        purl = model_purl(self.model.repo_id, self.model.commit) or ""
        if constants.ENDPOINT == _PUBLIC_HUB:
            return purl
        return f"{purl}?repository_url={quote(constants.ENDPOINT, safe='')}"

    def subjects(self, digests: Mapping[str, FileDigest]) -> tuple[dict[str, Any], ...]:
        repo = {"name": self.model.repo_id, "digest": {"gitCommit": self.model.commit}}
        return repo, *_subjects(self.files, digests)


@dataclass(frozen=True)
class FolderArtifact:
    """A folder of this machine.

    Attributes:
        origin: the folder itself, which is only read.
        folder: an empty one; what is brought is linked there.
    """

    origin: Path
    folder: Path

    commit: None = None
    repo_id: None = None

    @property
    def files(self) -> Mapping[str, Listed]:
        return {
            name: _listed(self.origin, path)
            for name, path in entries(self.origin).items()
            if not name.startswith(_BESIDE_A_DOWNLOAD)
        }

    def bring(self, names: Collection[str], reporter: Reporter) -> dict[str, FileDigest]:
        paths = {name: (self.origin / name).resolve() for name in sorted(names)}
        total = sum(path.stat().st_size for path in paths.values())
        digests = {}
        with reporter.task("check", total) as task:
            for name, path in paths.items():
                link = self.folder / name
                if not link.is_symlink():
                    make_folder(link.parent)
                    link.symlink_to(path)
                digests[name] = digest_file(path, task)
        return digests

    def uri(self, digests: Mapping[str, FileDigest]) -> str:
        checksum = f"sha256:{content_sha256(digests)}"
        return f"pkg:generic/{quote(self.origin.name, safe='')}?checksum={quote(checksum)}"

    def subjects(self, digests: Mapping[str, FileDigest]) -> tuple[dict[str, Any], ...]:
        return _subjects(self.files, digests)


def _subjects(
    files: Mapping[str, Listed], digests: Mapping[str, FileDigest]
) -> tuple[dict[str, Any], ...]:
    hashed = {name: {"sha256": digest.sha256} for name, digest in digests.items()}
    said = {name: hashed.get(name) or listed.digest for name, listed in files.items()}
    return tuple(
        {"name": name, "digest": digest} for name, digest in sorted(said.items()) if digest
    )


def _listed(folder: Path, path: Path) -> Listed:
    if path.is_symlink() and not _may_stay(folder, path):
        return Listed(0, problem="is a link, and not a file")
    if not path.is_file():
        return Listed(0, problem="is no plain file")
    return Listed(path.stat().st_size)


def _may_stay(folder: Path, path: Path) -> bool:
    """Whether a link is one of those of which a snapshot in a Hub cache is made."""
    home = folder.resolve()
    is_snapshot = home.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", home.name)
    return bool(is_snapshot) and path.resolve().is_relative_to(home.parents[1] / "blobs")


def open_published(name: str, view: Path, reporter: Reporter) -> Published:
    """Finds an artifact, and what it lists; nothing of it is read.

    Args:
        name: a folder, or ORG/NAME of the Hub with an optional @REVISION.
        view: an empty folder, for links to a folder's files.
        reporter: told what is waited for.

    Raises:
        UsageError: the name is no folder, and cannot be that of a repo or a revision.
        NotFoundError: the Hub has no such repo or revision, or does not show it.
        HubError: the Hub does not answer, or answers with what no Hub says.
    """
    path = model_path(name)
    if path.is_dir():
        export = path / "export"
        is_build = (path / "records").is_dir() and not os.path.lexists(path / MANIFEST_FILE)
        return FolderArtifact(export if is_build and export.is_dir() else path, view)
    repo_id, revision = at_revision(name) or (name, None)
    check_hub_id(repo_id)
    with reporter.task("ask the Hub", None):
        model = hub.resolve(repo_id, revision)
    if model.offline:
        raise HubError(
            f"{name}: HF_HUB_OFFLINE is set, and what a repo holds only the Hub can say. Unset it."
        )
    return HubArtifact(model)
