"""Worker threads over the chunks of all files of a plan."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

from nf4_pipeline.checkpoint.layout import FileLayout
from nf4_pipeline.checkpoint.sink import Sink, WrittenFile
from nf4_pipeline.checkpoint.source import Checkpoint
from nf4_pipeline.engine.buffers import Budget
from nf4_pipeline.engine.chunks import Chunk, OpenFile, Source, cut
from nf4_pipeline.engine.shard_job import ShardJob, ThreadBuffers
from nf4_pipeline.engine.tied_weights import TiedTensor
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.nf4.rounding import Rounding
from nf4_pipeline.progress import Task
from nf4_pipeline.selection import Plan, TensorPlan

Call = Callable[[], None]

_OPEN_FILES: Final = 2, 8
"""Output files in work at a time, at least and at most: while one is hashed to its end and synced,
the next goes on; and where many threads work, the hash of one file cannot keep up with them."""


@dataclass(frozen=True)
class Output:
    """A file to make.

    Attributes:
        name: of the file.
        tensors: in the order in which they are made; all from one checkpoint file.
        layout: where each of their stored tensors goes.
    """

    name: str
    tensors: tuple[TensorPlan, ...]
    layout: FileLayout

    @property
    def source(self) -> str:
        """The checkpoint file that they come from."""
        return self.tensors[0].source.file


Opener = Callable[[Output], AbstractContextManager[Sink]]


@dataclass(frozen=True)
class QuantizedFile:
    """An output file and how far its weights are from the source.

    Attributes:
        written: digest, tensors and their hashes.
        relative_rmse: by the name of each quantized weight, sqrt(sum (w - w')^2 / sum w^2), where
            w' is what readers compute in float32.
    """

    written: WrittenFile
    relative_rmse: dict[str, float]


def make_files(
    checkpoint: Checkpoint,
    plan: Plan,
    outputs: Sequence[Output],
    opener: Opener,
    done: Callable[[str, QuantizedFile], None],
    *,
    rounding: Rounding,
    budget: Budget,
    task: Task,
    passing: Source | None = None,
) -> None:
    """Makes files of quantized and copied tensors, and leaves to `opener` where the bytes go.

    Args:
        checkpoint: the source.
        plan: what happens to each tensor.
        outputs: the files.
        opener: gives what takes the bytes of a file.
        done: told of each file once it is whole; one call at a time.
        rounding: chooses codes and scales.
        budget: threads and chunk size.
        task: advanced by the source bytes that are done.
        passing: gives the bytes of the one checkpoint file that all outputs are made of, in their
            order, as they pass by; None to open the files. Tied tensors are not compared then,
            since their twin may be elsewhere.

    Raises:
        CheckpointError: a weight holds an infinity or a NaN, or a file cannot be read or became
            shorter while it was read.
        TiedWeightsDiffer: a tensor was to be dropped and does not equal the one it is tied to.
    """
    engine = _Engine(checkpoint, plan, rounding, budget, task)
    with engine.opened(passing):
        jobs: list[Call] = [partial(engine.make, output, opener, done) for output in outputs]
        fewest, most = _OPEN_FILES if passing is None else (1, 1)  # what passes has one place
        _run_all(jobs, min(most, max(fewest, budget.workers // 2)), engine.stop)


class _Engine:
    """What the jobs of one run share."""

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, rounding: Rounding, budget: Budget, task: Task
    ) -> None:
        self.stop = threading.Event()
        self._checkpoint = checkpoint
        self._plan = plan
        self._rounding = rounding
        self._budget = budget
        self._task = task
        self._buffers = ThreadBuffers(rounding, budget.chunk_bytes)
        self._done = threading.Lock()
        self._sources: dict[str, Source] = {}
        self._tied: dict[str, list[TiedTensor]] = {}  # by the source name of the tensor that stays
        self._pool: ThreadPoolExecutor

    @contextmanager
    def opened(self, passing: Source | None) -> Iterator[None]:
        """Opens the source files, if nothing passes by, and starts the workers."""
        with ExitStack() as stack:
            for file in self._checkpoint.files:
                self._sources[file] = passing or OpenFile(
                    stack.enter_context(_open(self._checkpoint.path(file)))
                )
            for tensor in self._plan.by_action("drop"):
                if tensor.tied_to is not None and passing is None:
                    dropped = TiedTensor(tensor, self._sources[tensor.source.file])
                    self._tied.setdefault(tensor.tied_to, []).append(dropped)
            self._pool = stack.enter_context(ThreadPoolExecutor(self._budget.workers, "quantize"))
            yield

    def make(
        self, output: Output, opener: Opener, done: Callable[[str, QuantizedFile], None]
    ) -> None:
        """Makes one file."""
        chunks = {
            tensor.name: list(cut(tensor, self._budget.chunk_bytes)) for tensor in output.tensors
        }
        counts = {name: len(parts) for name, parts in chunks.items()}
        with opener(output) as sink:
            job = ShardJob(
                self._sources[output.source],
                sink,
                counts,
                self._rounding,
                self._buffers,
                self._task,
            )
            while tensors := [tensor for tensor in output.tensors if sink.wants(tensor.stored)]:
                self._work(job, (chunk for t in tensors for chunk in chunks[t.name]))
            written = sink.finish()
        with self._done:
            done(output.name, QuantizedFile(written, job.relative_rmse))

    def _work(self, job: ShardJob, chunks: Iterator[Chunk]) -> None:
        """Has chunks done by the workers, few ahead of what is done; the first error ends it."""
        room = threading.Semaphore(2 * self._budget.workers)
        failed = threading.Event()
        pending: deque[Future[None]] = deque()

        def finished(future: Future[None]) -> None:
            if not future.cancelled() and future.exception() is not None:
                failed.set()
            room.release()

        try:
            for chunk in chunks:
                room.acquire()
                while pending and pending[0].done():
                    pending.popleft().result()
                if failed.is_set():
                    break
                if self.stop.is_set():
                    raise _StoppedError
                tied = self._tied.get(chunk.tensor.source.name, ())
                job.announce(chunk, tied)
                future = self._pool.submit(job.make, chunk, tied)
                future.add_done_callback(finished)
                pending.append(future)
            for future in pending:
                future.result()
        finally:
            # Nothing may write into a file that is about to be closed.
            for future in pending:
                future.cancel()
            wait(pending)


class _StoppedError(Exception):
    """Another job failed; this one ends, too."""


def _run_all(jobs: list[Call], at_a_time: int, stop: threading.Event) -> None:
    """Runs jobs in order, some at a time; after an error the others are stopped."""
    queue = iter(jobs)
    with ThreadPoolExecutor(at_a_time, "file") as pool:
        pending = {pool.submit(job) for job in islice(queue, at_a_time)}
        failures: list[BaseException] = []
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                failures += [e for future in done if (e := future.exception()) is not None]
                if failures:
                    stop.set()
                else:
                    pending |= {pool.submit(job) for job in islice(queue, len(done))}
        except BaseException:
            stop.set()
            raise
    real = [failure for failure in failures if not isinstance(failure, _StoppedError)]
    if real:
        raise real[0]


@contextmanager
def _open(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
