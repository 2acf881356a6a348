"""A reporter that keeps what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nf4_pipeline.progress import SILENT, Task


class Notes:
    """Keeps notes, in their order; shows no progress."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def task(self, title: str, total: int, *, unit: str = "bytes") -> Iterator[Task]:
        with SILENT.task(title, total, unit=unit) as task:
            yield task
