"""Says when kernels are compiled: the first call on a machine takes seconds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

from numba.core.event import Event, Listener, install_listener

from nf4_pipeline.progress import Reporter

TITLE: Final = "compile kernels (numba)"


@contextmanager
def compilation_shown(reporter: Reporter) -> Iterator[None]:
    """Opens a task while numba compiles, in whatever thread; what comes from its cache shows none.

    Args:
        reporter: told.
    """
    with install_listener("numba:compile", _Compilations(reporter)):
        yield


class _Compilations(Listener):  # type: ignore[misc]
    """One task for all that compile at the same time."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._lock = threading.Lock()
        self._running = 0
        self._shown: AbstractContextManager[Any] | None = None

    def on_start(self, event: Event) -> None:
        with self._lock:
            self._running += 1
            if self._running == 1:
                self._shown = self._reporter.task(TITLE, None)
                self._shown.__enter__()

    def on_end(self, event: Event) -> None:
        with self._lock:
            self._running -= 1
            if self._running == 0 and self._shown is not None:
                self._shown.__exit__(None, None, None)
                self._shown = None
