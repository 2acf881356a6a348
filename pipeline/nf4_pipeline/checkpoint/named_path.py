"""A path as somebody wrote it, looked at before the system is asked for it.

The system takes no NUL, no name of more than 255 bytes, and no home folder of a user that it does
not know; Python says each in another way. A name that is not UTF-8 has no place in a record.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from nf4_pipeline.errors import UsageError

_LONGEST_NAME: Final = 255
_LONGEST_PATH: Final = 4095


def named_path(name: str | Path) -> Path:
    """The path that is meant by a name, which may begin with "~".

    Raises:
        UsageError: no path can be called so.
    """
    if not str(name):
        raise UsageError("A path is empty: what was to name it, such as a variable, is not set.")
    if (problem := problem_of(str(name))) is not None:
        raise UsageError(f"{str(name)[:80]!r} can be no path: {problem}.")
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
