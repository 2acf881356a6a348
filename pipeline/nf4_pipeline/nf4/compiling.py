"""Says when kernels are compiled: the first call on a machine takes seconds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Final

from nf4_pipeline.progress import Reporter

if TYPE_CHECKING:
    from numba.core.event import Event

TITLE: Final = "compile kernels (numba)"


@contextmanager
def compilation_shown(reporter: Reporter) -> Iterator[None]:
    """Opens a task while numba compiles, in whatever thread; what comes from its cache shows none.

    Args:
        reporter: told.
    """
    from numba.core.event import Listener, install_listener

    Listener.register(_Compilations)
    with install_listener("numba:compile", _Compilations(reporter)):
        yield


class _Compilations:
    """One task for all that compile at the same time.

    It is a listener by its one method, not by its base: numba is imported when something may be
    compiled, and not by everybody who could quantize.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._lock = threading.Lock()
        self._running = 0
        self._shown: AbstractContextManager[Any] | None = None

    def notify(self, event: Event) -> None:
        """What numba calls at the beginning and at the end of each compilation."""
        with self._lock:
            self._running += 1 if event.is_start else -1
            if self._running and self._shown is None:
                self._shown = self._reporter.task(TITLE, None)
                self._shown.__enter__()
            elif not self._running and self._shown is not None:
                self._shown.__exit__(None, None, None)
                self._shown = None
