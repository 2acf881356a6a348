"""A checkpoint as far as it is known: its small files, and weights that are a header and a hole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def skeleton(
    folder: Path, small: Iterable[str], weights: Mapping[str, tuple[bytes, int]]
) -> Iterator[Path]:
    """A folder that everything which reads no weights can read; deleted at the end.

    Args:
        folder: where the small files are.
        small: their names.
        weights: the first bytes of each file of weights, and its size in bytes; the rest of it is a
            hole, which takes no place on a disk.
    """
    with TemporaryDirectory(prefix="nf4-") as name:
        made = Path(name)
        for file in small:
            (made / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, made / file)
        for file, (start, size) in weights.items():
            (made / file).write_bytes(start)
            os.truncate(made / file, size)
        yield made
