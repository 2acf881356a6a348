"""A fixed memory budget, divided among the workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nf4_pipeline.errors import UsageError

DEFAULT_BUDGET: Final = 256 * 2**20
_MIN_CHUNK: Final = 2**20
_PER_CHUNK: Final = 2  # a worker holds a chunk, its codes (a quarter), scales and hashing buffers


@dataclass(frozen=True)
class Budget:
    """How many threads work, and on how large a chunk each.

    Attributes:
        workers: threads.
        chunk_bytes: source bytes that one worker holds at a time.
    """

    workers: int
    chunk_bytes: int


def divide(memory: int, workers: int, max_chunk: int) -> Budget:
    """Divides a memory budget.

    Args:
        memory: bytes for all buffers together.
        workers: threads that are wanted; fewer are used if the memory does not give each of them a
            chunk of 1 MiB.
        max_chunk: bytes beyond which a chunk is not faster.

    Raises:
        UsageError: the memory does not hold the buffers of a single worker.
    """
    fitting = memory // (_PER_CHUNK * _MIN_CHUNK)
    if fitting < 1:
        raise UsageError(
            f"The memory budget of {memory:,} bytes is too small; expected at least "
            f"{_PER_CHUNK * _MIN_CHUNK:,}."
        )
    used = min(workers, fitting)
    chunk = min(max_chunk, memory // (_PER_CHUNK * used))
    return Budget(used, chunk // _MIN_CHUNK * _MIN_CHUNK)
