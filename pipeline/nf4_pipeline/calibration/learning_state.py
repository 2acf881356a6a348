"""How far learning is, in one file that is whole or not there: a killed run goes on from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.checkpoint.atomic import replacing, write_at
from nf4_pipeline.documents import Document

_LENGTH: Final = 8  # bytes that say how long the header is
_LONGEST: Final = 64 * 2**20  # bytes of a header
_DIGEST: Final = 32  # bytes at the end


@dataclass(frozen=True, kw_only=True)
class Progress(Document):
    """Where learning stands.

    Attributes:
        step: how many steps are done.
        since: of them, before latents were last begun anew.
        halvings: how often the rate was halved.
        start_kl: on held-back samples, before the first step.
        best_kl: the least since, nats per token.
        ended: learning was given up, as it did harm.
        repeatable: all gradients are the same each time.
    """

    step: int = 0
    since: int = 0
    halvings: int = 0
    start_kl: float = float("inf")
    best_kl: float = float("inf")
    ended: bool = False
    repeatable: bool = True


def write_state(path: Path, progress: Progress, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Keeps a state in the place of an earlier one, array by array.

    Args:
        path: of the file.
        progress: where learning stands.
        arrays: of numbers, by name.
    """
    listed = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    header = json.dumps({"progress": progress.to_json(), "arrays": listed}).encode()
    digest = hashlib.sha256()
    with replacing(path) as descriptor:
        offset = 0

        def write(part: memoryview) -> None:
            nonlocal offset
            digest.update(part)
            write_at(descriptor, part, offset)
            offset += part.nbytes

        write(memoryview(len(header).to_bytes(_LENGTH, "little")))
        write(memoryview(header))
        for array in arrays.values():
            write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        write_at(descriptor, memoryview(digest.digest()), offset)


def read_state(path: Path) -> tuple[Progress, dict[str, NDArray[Any]]] | None:
    """What `write_state` kept; None if there is nothing, or not what was written."""
    try:
        with path.open("rb") as file:
            start = file.read(_LENGTH)
            length = int.from_bytes(start, "little")
            if length > _LONGEST:
                return None
            header = file.read(length)
            digest = hashlib.sha256(start + header)
            value = json.loads(header)
            arrays: dict[str, NDArray[Any]] = {}
            for name, dtype, shape in value["arrays"]:
                array = np.fromfile(file, np.dtype(dtype), int(np.prod(shape))).reshape(shape)
                digest.update(array.reshape(-1).view(np.uint8).data)
                arrays[name] = array
            if file.read(_DIGEST + 1) != digest.digest():
                return None
            return Progress.from_json(value["progress"]), arrays
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
