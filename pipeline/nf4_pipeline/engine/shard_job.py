"""One output file: what happens to each of its chunks, and what is known at the end."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.checkpoint.sink import Sink
from nf4_pipeline.engine.chunks import Chunk, Source, read_chunk
from nf4_pipeline.engine.tied_weights import TiedTensor
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.nf4 import BLOCK_SIZE
from nf4_pipeline.nf4.float_bits import bits_in, float32_of
from nf4_pipeline.nf4.packing import packed_bytes
from nf4_pipeline.nf4.rounding import Rounding, WeightRounding
from nf4_pipeline.progress import Task
from nf4_pipeline.selection import QUANTIZABLE_DTYPES, TensorPlan


class ThreadBuffers(threading.local):
    """Buffers of one worker, kept from chunk to chunk and from file to file."""

    def __init__(self, rounding: Rounding, chunk_bytes: int) -> None:
        self._rounding = rounding
        self._chunk_bytes = chunk_bytes
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def get(self, purpose: str, nbytes: int, share: int = 1) -> NDArray[np.uint8]:
        """At least `nbytes` for a purpose; usually `1 / share` of a chunk."""
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer.size < nbytes:
            buffer = self._rounding.buffer(max(nbytes, self._chunk_bytes // share))
            self._buffers[purpose] = buffer
        return buffer[:nbytes]


def _check_finite(data: NDArray[Any], chunk: Chunk) -> None:
    """Refuses an infinity or a NaN among values that are copied.

    Raises:
        CheckpointError: the chunk holds one.
    """
    from nf4_pipeline.engine.finite import first_not_finite  # and numba

    source = chunk.tensor.source
    bad = first_not_finite(data, source.header.dtype)
    if bad is not None:
        place = np.unravel_index(chunk.start + bad, source.header.shape)
        raise CheckpointError(
            f"{source.name!r} in {source.file} holds an infinity or a NaN, the first at "
            f"{[int(index) for index in place]} of {list(source.header.shape)}. Such a checkpoint "
            "is damaged or its training failed; look for a corrected revision."
        )


@dataclass
class _Weight:
    """A weight that is being quantized, shared by the workers that hold its chunks."""

    plan: TensorPlan
    rounding: WeightRounding
    left: int


class ShardJob:
    """Makes the bytes of one output file, chunk by chunk, from any thread.

    Args:
        source: the checkpoint file.
        output: takes the bytes of the file.
        chunks_of: number of chunks of each weight, by name.
        rounding: chooses codes and scales.
        buffers: of the calling thread.
        task: advanced by the source bytes that are done.
    """

    def __init__(
        self,
        source: Source,
        output: Sink,
        chunks_of: dict[str, int],
        rounding: Rounding,
        buffers: ThreadBuffers,
        task: Task,
    ) -> None:
        self.relative_rmse: dict[str, float] = {}
        self._source = source
        self._output = output
        self._chunks_of = chunks_of
        self._rounding = rounding
        self._buffers = buffers
        self._task = task
        self._open: dict[str, _Weight] = {}
        self._lock = threading.Lock()

    def announce(self, chunk: Chunk, tied: Sequence[TiedTensor] = ()) -> None:
        """Has the system begin to read what `make` will soon ask for."""
        self._source.will_read(chunk)
        for other in tied:
            other.announce(chunk)

    def make(self, chunk: Chunk, tied: Sequence[TiedTensor] = ()) -> None:
        """Does with a chunk what the plan says, and checks the tensors dropped for its own."""
        if chunk.tensor.action == "quantize":
            self._quantize(chunk)
        else:
            self._copy(chunk, tied)
        self._task.advance(chunk.nbytes)

    def _copy(self, chunk: Chunk, tied: Sequence[TiedTensor]) -> None:
        data = read_chunk(self._source, chunk, self._buffers.get("in", chunk.nbytes))
        _check_finite(data, chunk)
        for other in tied:
            other.check(data, chunk, self._buffers.get("tied", chunk.nbytes))
        if chunk.tensor.cast_to is not None:
            data = _cast(data, chunk.tensor)
        self._output.write(chunk.tensor.name, chunk.start * data.itemsize, data)

    def _quantize(self, chunk: Chunk) -> None:
        """Rounds a chunk of a weight; the last one finishes the weight."""
        plan = chunk.tensor
        weight = self._weight(plan)
        bits = read_chunk(self._source, chunk, self._buffers.get("in", chunk.nbytes))
        packed = self._buffers.get("codes", packed_bytes(chunk.count), share=4)
        dtype = QUANTIZABLE_DTYPES[plan.source.header.dtype]
        block = weight.rounding.quantize_chunk(bits, dtype, chunk.start, packed)
        if block is not None:
            raise CheckpointError(
                f"{plan.source.name!r} in {plan.source.file} holds an infinity or a NaN (weights "
                f"{chunk.start + block * BLOCK_SIZE} and on). Such a checkpoint cannot be "
                "quantized; look for a corrected revision."
            )
        self._output.write(plan.name, packed_bytes(chunk.start), packed)
        if self._finished_one(weight):
            self._finish(weight)

    def _weight(self, plan: TensorPlan) -> _Weight:
        with self._lock:
            if plan.name not in self._open:
                rounding = self._rounding.start_weight(plan.name, prod(plan.shape))
                self._open[plan.name] = _Weight(plan, rounding, self._chunks_of[plan.name])
            return self._open[plan.name]

    def _finished_one(self, weight: _Weight) -> bool:
        with self._lock:
            weight.left -= 1
            if weight.left == 0:
                del self._open[weight.plan.name]
            return weight.left == 0

    def _finish(self, weight: _Weight) -> None:
        """All codes are chosen: the scales and the other companions are written."""
        plan, rounded = weight.plan, weight.rounding.finish()
        for name, data in plan.companions(rounded.scales).items():
            self._output.write(name, 0, data)
        with self._lock:
            self.relative_rmse[plan.name] = rounded.relative_rmse


def _cast(bits: NDArray[Any], plan: TensorPlan) -> NDArray[Any]:
    """The bits of a kept tensor in the dtype that it is stored in."""
    source, wanted = plan.source, QUANTIZABLE_DTYPES[plan.cast_to or ""]
    values = float32_of(bits, QUANTIZABLE_DTYPES[source.header.dtype])
    cast = bits_in(values, wanted)
    if (np.isinf(float32_of(cast, wanted)) & np.isfinite(values)).any():
        raise CheckpointError(
            f"{source.name!r} in {source.file} is {source.header.dtype} and holds numbers too "
            f"large for {wanted}, in which config.json has this model computed. Set torch_dtype "
            "in the source's config.json to bfloat16 or float32."
        )
    return cast
