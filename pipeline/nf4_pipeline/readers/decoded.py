"""The NumPy decoder's weights against ours, to the last bit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Event
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.checkpoint.safetensors_header import read_header
from nf4_pipeline.documents import Document
from nf4_pipeline.errors import ResourceError, is_of_machine
from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.dequantize import dequantize
from nf4_pipeline.nf4.stored_weight import StoredWeight
from nf4_pipeline.processes.parent_side import ChildFailed, start
from nf4_pipeline.processes.worker import Worker
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.readers import numpy_decoder
from nf4_pipeline.readers.document import ReaderResult

_DTYPES = {"U8": np.uint8, "F32": np.float32}
_UNREADABLE: Final = (KeyError, ValueError, IndexError, OSError)
_MANY: Final = 10**9  # weights that one process decodes in three seconds
_PROCESSES: Final = 8
_LOOK_EVERY: Final = 0.1  # seconds


@dataclass(frozen=True)
class DecodeRequest(Document):
    """The artifact, and the shapes of the weights to decode, by name."""

    artifact: Path
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class DecodeReply(Document):
    """What is wrong with the first weight that is; empty for nothing."""

    wrong: str


WORKER: Final = Worker[DecodeRequest, DecodeReply](
    "nf4_pipeline.readers.decode_worker", DecodeReply
)


def decode_with_numpy(
    artifact: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    promised: bool = True,
    reporter: Reporter = SILENT,
    stop: Event | None = None,
) -> ReaderResult:
    """Decodes every quantized weight twice, a piece at a time, and compares the bits.

    Many weights are shared out among processes: NumPy takes one thread.

    Args:
        artifact: the export folder; its files are taken to be those of the manifest.
        shapes: of the quantized weights, by name, as the manifest has them.
        promised: whether the card promises that any reader can do this.
        reporter: told how many weights are done.
        stop: set, if nobody wants to know any more.

    Raises:
        ResourceError: a process was killed, or the machine lacks something that it needs.
    """
    stop = stop or Event()
    try:
        wrong = _names_wrong(artifact, shapes) or _compare_all(artifact, shapes, reporter, stop)
    except _UNREADABLE as error:
        if is_of_machine(error):  # which says nothing of the artifact
            raise
        wrong = f"{type(error).__name__}: {error}"
    except ChildFailed as error:
        if error.status == -signal.SIGKILL:
            raise ResourceError(
                f"A process that decodes {artifact} was killed: as a rule, memory ran out. End "
                "other programs, then run `nf4 verify` again."
            ) from error
        wrong = f"its process died with status {error.status}: {error.cause}"
    return ReaderResult(
        name="numpy",
        version=np.__version__,
        promised=promised,
        outcome="failed" if wrong else "passed",
        why=wrong or f"{len(shapes)} weights decoded to the same bits as ours, in float32",
        layers=None if wrong else len(shapes),
        logits_distance=None,
    )


def _names_wrong(artifact: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What is 4 bit in one of files and manifest only, or nothing."""
    found = numpy_decoder.open_tensors(artifact)
    names = {n.removesuffix(numpy_decoder.STATE) for n in found if n.endswith(numpy_decoder.STATE)}
    if names == set(shapes):
        return ""
    name = min(names ^ set(shapes))
    return f"{name} is 4 bit in {'the files' if name in names else 'the manifest'} alone"


def _compare_all(
    artifact: Path, shapes: Mapping[str, tuple[int, ...]], reporter: Reporter, stop: Event
) -> str:
    """What is wrong with the first weight that is, or nothing."""
    weights = sum(map(prod, shapes.values()))
    processes = 1 if weights < _MANY else min(_PROCESSES, len(os.sched_getaffinity(0)) // 2)
    with reporter.task("decode with NumPy", weights, unit="weights") as task:
        if processes < 2:
            return compare_share(artifact, shapes, task.advance, stop.is_set)

        def compare(names: list[str]) -> str:
            share = {name: shapes[name] for name in names}
            with start(WORKER, DecodeRequest(artifact, share)) as child:
                while not child.is_speaking:
                    if stop.wait(_LOOK_EVERY):
                        return "stopped"
                wrong = child.wait().wrong
            task.advance(sum(map(prod, share.values())))
            return wrong

        shares = _shares(shapes, 2 * processes)
        with ThreadPoolExecutor(processes, "numpy readers") as pool:
            return next(filter(None, pool.map(compare, shares)), "")


def _shares(shapes: Mapping[str, tuple[int, ...]], count: int) -> list[list[str]]:
    """Names in shares of about as many weights."""
    shares: list[list[str]] = [[] for _ in range(count)]
    sizes = [0] * count
    for name in sorted(shapes, key=lambda name: -prod(shapes[name])):
        least = sizes.index(min(sizes))
        shares[least].append(name)
        sizes[least] += prod(shapes[name])
    return [share for share in shares if share]


def compare_share(
    artifact: Path,
    shapes: Mapping[str, tuple[int, ...]],
    advance: Callable[[int], None] = lambda amount: None,
    stopped: Callable[[], bool] = lambda: False,
) -> str:
    """Decodes some weights twice; what is wrong with the first that differs, or nothing.

    Args:
        artifact: the export folder.
        shapes: of the weights, by name.
        advance: told how many weights are done.
        stopped: whether nobody wants to know any more.
    """
    found, own = numpy_decoder.open_tensors(artifact), _own_tensors(artifact)
    for name, shape in shapes.items():
        state = json.loads(found[name + numpy_decoder.STATE].tobytes())
        if tuple(state["shape"]) != tuple(shape):
            return f"{name} has the shape {state['shape']}, not {list(shape)}"
        ours = StoredWeight.read(name, own)
        scales, done = ours.scales.scales(), 0
        for piece in numpy_decoder.decode(found, name, state):
            if not np.array_equal(_bits(piece), _bits(_piece(ours, scales, done, piece.size))):
                return f"{name} is decoded otherwise, at weights {done:,} and on"
            if stopped():
                return "stopped"
            done += piece.size
            advance(piece.size)
        if done != prod(shape):
            return f"{name} ends after {done:,} weights"
    return ""


def _piece(
    ours: StoredWeight, scales: NDArray[np.float32], start: int, size: int
) -> NDArray[np.float32]:
    """Our own dequantization of some weights; `start` is a multiple of the block size."""
    packed = ours.packed[start // 2 : (start + size + 1) // 2]
    return dequantize(packed, scales[start // BLOCK_SIZE :][: -(-size // BLOCK_SIZE)], (size,))


def _bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(values).view(np.uint32)


def _own_tensors(artifact: Path) -> dict[str, NDArray[Any]]:
    """What our own reading of the headers finds, mapped."""
    return {
        tensor.name: np.memmap(path, _DTYPES[tensor.dtype], "r", tensor.offset, tensor.shape)
        for path in sorted(artifact.glob("*.safetensors"))
        for tensor in read_header(path)
        if tensor.dtype in _DTYPES and tensor.nbytes
    }
