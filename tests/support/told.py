"""A reporter that checks what it is told: no task passes its total, nor stops short of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from nf4_pipeline.progress import SilentReporter, Task


@dataclass
class ToldTask:
    """A task of which it was told."""

    title: str
    total: int | None
    done: int = 0
    failed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def advance(self, amount: int) -> None:
        with self._lock:
            self.done += amount
            assert amount >= 0
            assert self.total is None or self.done <= self.total, self


@dataclass
class Told(SilentReporter):
    """Every task that ends well was done to its total."""

    tasks: list[ToldTask] = field(default_factory=list)

    def of(self, title: str) -> list[ToldTask]:
        """The tasks of a title."""
        return [task for task in self.tasks if task.title == title]

    @contextmanager
    def task(self, title: str, total: int | None, *, unit: str = "bytes") -> Iterator[Task]:
        told = ToldTask(title, total)
        self.tasks.append(told)
        try:
            yield told
        except BaseException:
            told.failed = True
            raise
        assert total is None or told.done == total, told
