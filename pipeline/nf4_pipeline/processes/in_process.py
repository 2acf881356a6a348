"""For tests: workers run in the process that asks for them, which has imported torch anyway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0


@contextmanager
def in_process() -> Iterator[None]:
    """While the body runs, `start` starts no process.

    Requests and replies pass through JSON all the same; limits and environments do not apply.
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def is_in_process() -> bool:
    """Whether workers run in this process now."""
    return _depth > 0
