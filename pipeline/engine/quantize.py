"""One source file in, one quantized file out."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.checkpoint.digest import FileDigest, digest_tensors
from pipeline.checkpoint.header import HeaderTensor
from pipeline.checkpoint.layout import FileLayout
from pipeline.checkpoint.writer import TensorFile, writing
from pipeline.engine.chunks import CHUNK_BYTES, Chunk, cut, read_chunk
from pipeline.errors import CheckpointError
from pipeline.nf4 import BLOCK_SIZE, cpu
from pipeline.nf4.codebook import NF4_LEVELS, SCALE_LEVELS
from pipeline.nf4.double_quant import double_quantize
from pipeline.nf4.layout import QUANT_STATE_SUFFIX, blocks_of, quant_state_text
from pipeline.nf4.rounding import Rounding
from pipeline.progress import Task
from pipeline.selection import FLOAT_DTYPES, TensorPlan


@dataclass(frozen=True)
class QuantizedFile:
    """What is known of a file after it was written.

    Attributes:
        digest: of the whole file.
        tensors: every stored tensor in the order of its bytes.
        sha256: of each stored tensor's bytes, by name.
        relative_rmse: by the name of each quantized weight, sqrt(sum (w - w')^2 / sum w^2), where
            w' is what readers compute in float32.
    """

    digest: FileDigest
    tensors: tuple[HeaderTensor, ...]
    sha256: dict[str, str]
    relative_rmse: dict[str, float]


@dataclass
class _Weight:
    """A weight that is being quantized, shared by the workers that hold its chunks."""

    plan: TensorPlan
    left: int
    absmax: NDArray[np.float32] = field(init=False)
    sums: NDArray[np.float32] = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        blocks = blocks_of(prod(self.plan.shape))
        self.absmax = np.empty(blocks, np.float32)
        self.sums = np.empty((blocks, 3), np.float32)

    def finished_one(self) -> bool:
        """Counts a chunk as done; True for the last one."""
        with self.lock:
            self.left -= 1
            return self.left == 0


class _FileJob:
    """The state of one output file while workers fill it."""

    def __init__(self, source: int, output: TensorFile, rounding: Rounding, task: Task) -> None:
        self.source = source
        self.output = output
        self.rounding = rounding
        self.task = task
        self.texts: dict[str, bytes] = {}
        self.relative_rmse: dict[str, float] = {}
        self._buffers = threading.local()

    def copy(self, chunk: Chunk) -> None:
        data = read_chunk(self.source, chunk, self._buffer("in", chunk.nbytes))
        self.output.write(chunk.tensor.name, chunk.start * data.itemsize, data)
        self.task.advance(chunk.nbytes)

    def quantize(self, chunk: Chunk, weight: _Weight) -> None:
        plan = chunk.tensor
        bits = read_chunk(self.source, chunk, self._buffer("in", chunk.nbytes))
        packed = self._buffer("out", CHUNK_BYTES)[: -(-chunk.count // 2)]
        if packed.size < -(-chunk.count // 2):
            packed = np.empty(-(-chunk.count // 2), np.uint8)
        first = chunk.start // BLOCK_SIZE
        blocks = slice(first, first + blocks_of(chunk.count))
        dtype = FLOAT_DTYPES[plan.source.header.dtype]
        bad = self.rounding.quantize(
            bits, dtype, packed, weight.absmax[blocks], weight.sums[blocks]
        )
        if bad >= 0:
            raise CheckpointError(
                f"{plan.source.name!r} in {plan.source.file} holds an infinity or a NaN (weights "
                f"{(first + bad) * BLOCK_SIZE} and on). Such a checkpoint cannot be quantized; "
                "look for a corrected revision."
            )
        self.output.write(plan.name, chunk.start // 2, packed)
        if weight.finished_one():
            self._finish(weight)
        self.task.advance(chunk.nbytes)

    def _finish(self, weight: _Weight) -> None:
        """All blocks are rounded: the scales are rounded in turn, and the companions written."""
        plan, name = weight.plan, weight.plan.name
        nested = double_quantize(weight.absmax)
        self.output.write(f"{name}.absmax", 0, nested.codes)
        self.output.write(f"{name}.quant_map", 0, NF4_LEVELS)
        self.output.write(f"{name}.nested_absmax", 0, nested.absmax)
        self.output.write(f"{name}.nested_quant_map", 0, SCALE_LEVELS)
        dtype = FLOAT_DTYPES[plan.source.header.dtype]
        self.texts[name + QUANT_STATE_SUFFIX] = quant_state_text(plan.shape, dtype, nested.offset)
        error, energy = cpu.squared_error(weight.sums, nested.scales())
        # Six digits: more would depend on nothing a reader could use.
        self.relative_rmse[name] = float(f"{sqrt(error / energy):.6g}") if energy else 0.0

    def _buffer(self, name: str, size: int) -> NDArray[np.uint8]:
        """A buffer of this thread, kept from chunk to chunk."""
        buffer: NDArray[np.uint8] | None = getattr(self._buffers, name, None)
        if buffer is None or buffer.size < size:
            buffer = np.empty(max(size, CHUNK_BYTES), np.uint8)
            setattr(self._buffers, name, buffer)
        return buffer


def quantize_file(
    source: Path,
    target: Path,
    tensors: Sequence[TensorPlan],
    layout: FileLayout,
    *,
    rounding: Rounding,
    workers: int,
    task: Task,
) -> QuantizedFile:
    """Writes the quantized counterpart of one checkpoint file; complete, or not at all.

    Args:
        source: a safetensors file.
        target: where the result goes; replaced only when it is whole.
        tensors: what happens to each of its tensors (none of them dropped).
        layout: where the output tensors stand.
        rounding: chooses codes and scales.
        workers: threads.
        task: advanced by the source bytes that are done.

    Raises:
        CheckpointError: a weight is not finite, or the file became shorter while it was read.
    """
    with _opened(source) as descriptor, writing(target, layout) as output:
        job = _FileJob(descriptor, output, rounding, task)
        _run(_calls(job, tensors), workers)
        output.finish(job.texts)
        written = output.tensors
    digest, sha256 = digest_tensors(target, written)
    return QuantizedFile(digest, written, sha256, job.relative_rmse)


def _calls(job: _FileJob, tensors: Sequence[TensorPlan]) -> Iterator[tuple[Any, ...]]:
    for tensor in tensors:
        chunks = list(cut(tensor))
        if tensor.action == "keep":
            yield from ((job.copy, chunk) for chunk in chunks)
        else:
            weight = _Weight(tensor, len(chunks))
            yield from ((job.quantize, chunk, weight) for chunk in chunks)


def _run(calls: Iterator[tuple[Any, ...]], workers: int) -> None:
    """Runs calls in order on `workers` threads, few ahead of what is done; the first error wins."""
    with ThreadPoolExecutor(workers, thread_name_prefix="quantize") as pool:
        pending: set[Future[None]] = {pool.submit(*call) for call in islice(calls, 2 * workers)}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                pending |= {pool.submit(*call) for call in islice(calls, len(done))}
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
