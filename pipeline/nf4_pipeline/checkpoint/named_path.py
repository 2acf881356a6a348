"""A path as somebody wrote it, looked at before the system is asked for it.

A URL, such as s3://bucket/folder, may stand where the path of a build may: it means the local copy
of the build that is there.

The system takes no NUL, no name of more than 255 bytes, and no home folder of a user that it does
not know; Python says each in another way. A name that is not UTF-8 has no place in a record.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Final

from nf4_pipeline.errors import UsageError

ARTIFACTS: Final = Path("artifacts")
"""The folder that holds builds."""

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB: Final = re.compile(r"(https?|hf)://", re.I)
_SHOWN: Final = 100  # characters of a URL in the name of its local copy
_LONGEST_NAME: Final = 255
_LONGEST_PATH: Final = 4095


def is_url(name: object) -> bool:
    """Whether a name is a URL."""
    return isinstance(name, str) and bool(_URL.match(name))


def local_copy(url: str) -> Path:
    """The build folder that is the local copy of the build at a URL."""
    url = url.rstrip("/")
    word = re.sub(r"[^A-Za-z0-9._]+", "-", url.replace("://", "--", 1)).strip("-.")[:_SHOWN]
    return ARTIFACTS / f"{word}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def named_path(name: str | Path) -> Path:
    """The path that is meant by a name, which may begin with "~", or be the URL of a build.

    Raises:
        UsageError: no path can be called so.
    """
    if not str(name):
        raise UsageError("A path is empty: what was to name it, such as a variable, is not set.")
    if (problem := problem_of(str(name))) is not None:
        raise UsageError(f"{str(name)[:80]!r} can be no path: {problem}.")
    if isinstance(name, str) and is_url(name) and not _HUB.match(name):
        return local_copy(name)
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UsageError(f"{name}: there is no home folder of that name.") from None


def problem_of(name: str) -> str | None:
    """Why no file can be called so; None if one can."""
    if "\0" in name:
        return "there is a NUL in it"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "it is not UTF-8; rename it"
    encoded = os.fsencode(name)
    if len(encoded) > _LONGEST_PATH:
        return f"it has {len(encoded):,} bytes, and no path has more than {_LONGEST_PATH:,}"
    if (longest := max(map(len, encoded.split(b"/")))) > _LONGEST_NAME:
        return f"a name in it has {longest:,} bytes, and none has more than {_LONGEST_NAME}"
    return None
