"""What is to be on the Hub, held against what is. Pure but for hashing a file's bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nf4_pipeline.checkpoint.files import WEIGHT_FILE
from nf4_pipeline.checkpoint.weight_files import INDEX_FILE
from nf4_pipeline.hub.remote import RemoteFile, RemoteModel


@dataclass(frozen=True)
class LocalFile:
    """A file to be published: a path, or the bytes themselves; `size` in bytes, sha256 in hex."""

    content: Path | bytes
    size: int
    sha256: str

    @staticmethod
    def of_bytes(content: bytes) -> LocalFile:
        return LocalFile(content, len(content), hashlib.sha256(content).hexdigest())

    @cached_property
    def git_sha1(self) -> str:
        """What git calls these bytes; "changed" if they are no longer those of `sha256`."""
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            return "changed"
        head = b"blob %d\0" % len(content)
        return hashlib.sha1(head + content, usedforsecurity=False).hexdigest()

    def checked(self, remote: RemoteFile | None) -> dict[str, Any]:
        """What the Hub lists for it and what was expected, as plain JSON."""
        if remote is None:
            return {"algorithm": "sha256", "expected": self.sha256, "found": None}
        if remote.sha256:
            return {"algorithm": "sha256", "expected": self.sha256, "found": remote.sha256}
        return {"algorithm": "git-sha1", "expected": self.git_sha1, "found": remote.git_sha1}

    def equals(self, remote: RemoteFile | None) -> bool:
        """Whether the Hub holds these very bytes, as far as its checksums say."""
        if remote is None or remote.size != self.size:
            return False
        found = self.checked(remote)
        return bool(found["expected"] == found["found"])


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
    which loaders prefer), and what an earlier push left there; everything else stays.

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
            or (path in earlier and earlier[path] in (file.sha256, file.git_sha1))
        )
    )
    return Changes(put, delete)


def proof(remote: RemoteModel, files: Mapping[str, LocalFile]) -> dict[str, Any]:
    """What the Hub lists for each file at a commit beside what it must be, as plain JSON."""
    listed = {file.path: file for file in remote.files}
    return {
        "commit": remote.commit,
        "files": {
            path: {"size": file.size, **file.checked(listed.get(path))}
            for path, file in files.items()
        },
        "others": sorted(set(listed) - set(files)),
    }
