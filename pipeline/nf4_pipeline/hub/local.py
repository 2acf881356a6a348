"""What is to be on the Hub, held against what is. Pure but for hashing a file's bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

from nf4_pipeline.checkpoint.digest import FileStamp
from nf4_pipeline.checkpoint.files import WEIGHT_FILE
from nf4_pipeline.checkpoint.weight_files import INDEX_FILE
from nf4_pipeline.documents import Document
from nf4_pipeline.hub.remote import RemoteFile, RemoteModel

_OF_ITS_WEIGHTS: Final = {"calibration.json", "model.sig"}
"""Files of an artifact that are not in each, and speak of the weights beside them."""


@dataclass(frozen=True)
class FileProof(Document):
    """One file of a repo.

    Attributes:
        size: that it must have, in bytes.
        algorithm: of the checksum that the Hub lists for it.
        expected: the checksum that it must have, in hex.
        found: the one that the Hub lists; None if it lists no such file.
    """

    size: int
    algorithm: Literal["sha256", "git-sha1"]
    expected: str
    found: str | None


@dataclass(frozen=True)
class Proof(Document):
    """What the Hub lists at a commit beside what must be there.

    Attributes:
        commit: 40 hex digits.
        files: those that must be there, by path.
        others: paths of all further files, sorted.
    """

    commit: str
    files: Mapping[str, FileProof]
    others: tuple[str, ...]


@dataclass(frozen=True)
class LocalFile:
    """A file to be published.

    Attributes:
        content: a path, or the bytes themselves; None if the Hub alone has them, as a file that
            it received and no commit names yet.
        size: in bytes.
        sha256: in hex.
        stamp: what the file looked like when it was hashed; None for bytes.
    """

    content: Path | bytes | None
    size: int
    sha256: str
    stamp: FileStamp | None = None

    @staticmethod
    def of_bytes(content: bytes) -> LocalFile:
        return LocalFile(content, len(content), hashlib.sha256(content).hexdigest())

    @property
    def was_touched(self) -> bool:
        """Whether the file may hold other bytes than those that were hashed."""
        if not isinstance(self.content, Path) or self.stamp is None:
            return False
        return not self.content.is_file() or FileStamp.of(self.content) != self.stamp

    @cached_property
    def git_sha1(self) -> str:
        """What git calls these bytes; "changed" if they are no longer those of `sha256`."""
        content = self.content.read_bytes() if isinstance(self.content, Path) else self.content
        if content is None:  # what the Hub received so it keeps by its sha256
            return "unknown"
        if hashlib.sha256(content).hexdigest() != self.sha256:
            return "changed"
        head = b"blob %d\0" % len(content)
        return hashlib.sha1(head + content, usedforsecurity=False).hexdigest()

    def prove(self, remote: RemoteFile | None) -> FileProof:
        """What the Hub lists for it beside what was expected."""
        if remote is None:
            return FileProof(self.size, "sha256", self.sha256, None)
        if remote.sha256:
            return FileProof(self.size, "sha256", self.sha256, remote.sha256)
        return FileProof(self.size, "git-sha1", self.git_sha1, remote.git_sha1)

    def equals(self, remote: RemoteFile | None) -> bool:
        """Whether the Hub holds these very bytes, as far as its checksums say."""
        if remote is None or remote.size != self.size:
            return False
        proof = self.prove(remote)
        return proof.expected == proof.found


@dataclass(frozen=True)
class Changes:
    """What a commit must do to make a repo hold the files: paths to put, and paths to delete."""

    put: tuple[str, ...]
    delete: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.put or self.delete)


def changes(
    remote: RemoteModel, files: Mapping[str, LocalFile], earlier: Mapping[str, str]
) -> Changes:
    """Compares.

    Deleted is what would be read as part of the model though it is not (weights of another build,
    which loaders prefer; what another artifact's repo says of its own weights), and what an earlier
    push left there; everything else stays.

    Args:
        remote: what the repo holds.
        files: what it shall hold, by path.
        earlier: checksum of each file that an earlier push put there.
    """
    listed = {file.path: file for file in remote.files}
    put = tuple(path for path, file in files.items() if not file.equals(listed.get(path)))
    delete = tuple(
        path
        for path, file in listed.items()
        if path not in files
        and (
            WEIGHT_FILE.fullmatch(path)
            or path == INDEX_FILE
            or (path in _OF_ITS_WEIGHTS and "manifest.json" in listed)
            or (path in earlier and earlier[path] in (file.sha256, file.git_sha1))
        )
    )
    return Changes(put, delete)


def prove(remote: RemoteModel, files: Mapping[str, LocalFile]) -> Proof:
    """What the Hub lists for each file at a commit beside what it must be."""
    listed = {file.path: file for file in remote.files}
    return Proof(
        commit=remote.commit,
        files={path: file.prove(listed.get(path)) for path, file in files.items()},
        others=tuple(sorted(set(listed) - set(files))),
    )
