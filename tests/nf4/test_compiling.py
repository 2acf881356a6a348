"""Compiling is named while it happens, in whatever thread, and only then."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from nf4_pipeline.nf4.compiling import TITLE, compilation_shown
from nf4_pipeline.progress import SilentReporter, Task
from numba import njit


class Recorder(SilentReporter):
    def __init__(self) -> None:
        self.titles: list[str] = []
        self.open = 0

    @contextmanager
    def task(self, title: str, total: int | None, *, unit: str = "bytes") -> Iterator[Task]:
        self.titles.append(title)
        self.open += 1
        with super().task(title, total, unit=unit) as task:
            yield task
        self.open -= 1


def test_compiling_is_shown_once() -> None:
    @njit
    def twice(values):  # type: ignore[no-untyped-def]
        return values * 2

    recorder = Recorder()
    with compilation_shown(recorder):
        threads = [threading.Thread(target=twice, args=(np.ones(3),)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert recorder.titles == [TITLE]
        twice(np.ones(5))  # of the same types: it is compiled already
        assert recorder.titles == [TITLE]
    twice(np.ones(5, np.int32))  # nobody wants to know any more
    assert recorder.titles == [TITLE]
    assert recorder.open == 0
