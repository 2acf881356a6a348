"""The NumPy decoder's weights against ours, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.checkpoint.safetensors_header import read_header
from nf4_pipeline.errors import is_of_machine
from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.dequantize import dequantize
from nf4_pipeline.nf4.stored_weight import StoredWeight
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.readers import numpy_decoder
from nf4_pipeline.readers.document import ReaderResult

_DTYPES = {"U8": np.uint8, "F32": np.float32}


def decode_with_numpy(
    artifact: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    promised: bool = True,
    reporter: Reporter = SILENT,
) -> ReaderResult:
    """Decodes every quantized weight twice, a piece at a time, and compares the bits.

    Args:
        artifact: the export folder; its files are taken to be those of the manifest.
        shapes: of the quantized weights, by name, as the manifest has them.
        promised: whether the card promises that any reader can do this.
        reporter: told how many weights are done.
    """
    try:
        wrong = _compare(artifact, shapes, reporter)
    except (KeyError, ValueError, IndexError, OSError) as error:
        if is_of_machine(error):  # which says nothing of the artifact
            raise
        wrong = f"{type(error).__name__}: {error}"
    return ReaderResult(
        name="numpy",
        version=np.__version__,
        promised=promised,
        outcome="failed" if wrong else "passed",
        why=wrong or f"{len(shapes)} weights decoded to the same bits as ours, in float32",
        layers=None if wrong else len(shapes),
        logits_distance=None,
    )


def _compare(artifact: Path, shapes: Mapping[str, tuple[int, ...]], reporter: Reporter) -> str:
    """What is wrong, or nothing."""
    found = numpy_decoder.open_tensors(artifact)
    own = _own_tensors(artifact)
    names = {n.removesuffix(numpy_decoder.STATE) for n in found if n.endswith(numpy_decoder.STATE)}
    if names != set(shapes):
        name = min(names ^ set(shapes))
        return f"{name} is 4 bit in {'the files' if name in names else 'the manifest'} alone"
    weights = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
    with reporter.task("decode with NumPy", weights, unit="weights") as task:
        for name, shape in shapes.items():
            state = json.loads(found[name + numpy_decoder.STATE].tobytes())
            if tuple(state["shape"]) != tuple(shape):
                return f"{name} has the shape {state['shape']}, not {list(shape)}"
            ours = StoredWeight.read(name, own)
            scales, done = ours.scales.scales(), 0
            for piece in numpy_decoder.decode(found, name, state):
                if not np.array_equal(_bits(piece), _bits(_piece(ours, scales, done, piece.size))):
                    return f"{name} is decoded otherwise, at weights {done:,} and on"
                done += piece.size
                task.advance(piece.size)
            if done != np.prod(shape, dtype=np.int64):
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
