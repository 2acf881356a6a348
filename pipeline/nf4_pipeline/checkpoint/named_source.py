"""Of which model an artifact says that it is, for messages: read before anything is checked."""

from __future__ import annotations

import re
from pathlib import Path

from nf4_pipeline.checkpoint.plain_file import read_plain
from nf4_pipeline.checkpoint.strict_json import parse_json

_LARGEST = 64 * 2**20  # bytes of a manifest
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def named_source(artifact: Path) -> tuple[str, str | None] | None:
    """What `manifest.json` names as the source: a repo or a folder's name, and the commit.

    Args:
        artifact: the folder.

    Returns:
        None if it names nothing that a message could repeat.
    """
    try:
        source = parse_json(read_plain(artifact / "manifest.json", _LARGEST))["source"]
        repo, commit = source["repo"], source.get("commit")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    if not isinstance(repo, str) or not _REPO.fullmatch(repo) or len(repo) > 200:
        return None
    return repo, commit if isinstance(commit, str) and _COMMIT.fullmatch(commit) else None
