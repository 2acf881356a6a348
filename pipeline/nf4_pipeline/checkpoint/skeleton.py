"""A checkpoint as far as it is known: its small files, and weights that are a header and a hole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path


def make_skeleton(
    target: Path, folder: Path, small: Iterable[str], weights: Mapping[str, tuple[bytes, int]]
) -> None:
    """Fills a folder so that everything which reads no weights can read it.

    Args:
        target: an empty folder.
        folder: where the small files are.
        small: their names.
        weights: the first bytes of each file of weights, and its size in bytes; the rest of it is a
            hole, which takes no place on a disk.
    """
    for file in small:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, target / file)
    for file, (start, size) in weights.items():
        (target / file).write_bytes(start)
        os.truncate(target / file, size)
