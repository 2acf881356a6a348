"""Files of a build that the Hub has received, so that they need not lie here: sent.json."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from nf4_pipeline.checkpoint.atomic import write_json
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.checkpoint.plain_file import read_plain
from nf4_pipeline.documents import Document

_FILE: Final = "sent.json"
_LARGEST: Final = 16 * 2**20  # bytes


@dataclass(frozen=True, kw_only=True)
class Sent(Document):
    """What a Hub has received for a build, before or after a commit names it.

    Attributes:
        url: of the repo.
        files: bytes of each, by its sha256.
    """

    url: str = ""
    files: Mapping[str, int] = field(default_factory=dict)

    def has(self, digest: FileDigest) -> bool:
        """Whether a file is among them."""
        return self.files.get(digest.sha256) == digest.size


def read_sent(root: Path) -> Sent:
    """What is noted in a build folder; nothing, if no note can be read.

    Args:
        root: the build folder.
    """
    try:
        return Sent.from_json(json.loads(read_plain(root / _FILE, _LARGEST)))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return Sent()


def note_sent(root: Path, url: str, digest: FileDigest) -> None:
    """Notes that a Hub has a file; what was noted of another repo goes.

    Args:
        root: the build folder.
        url: of the repo.
        digest: of the file.
    """
    before = read_sent(root)
    files = dict(before.files) if before.url == url else {}
    _write(root, Sent(url=url, files={**files, digest.sha256: digest.size}))


def forget_sent(root: Path, hashes: Collection[str] | None = None) -> None:
    """Takes notes back: the Hub lost the files, or they are to be here again.

    Args:
        root: the build folder.
        hashes: sha256 of the files; None for all.
    """
    before = read_sent(root)
    gone = set(before.files if hashes is None else hashes)
    if before.files.keys() & gone:
        left = {sha256: size for sha256, size in before.files.items() if sha256 not in gone}
        _write(root, Sent(url=before.url, files=left))


def _write(root: Path, sent: Sent) -> None:
    write_json(root / _FILE, sent.to_json())
