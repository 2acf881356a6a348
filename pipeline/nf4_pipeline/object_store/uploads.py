"""Files that are put into a store while others are made."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Final, Self

from nf4_pipeline.object_store.store import ObjectStore
from nf4_pipeline.progress import Reporter

_AT_A_TIME: Final = 2


class Uploads:
    """Calls that put files into a store, made by threads of their own.

    Leaving the `with` block waits for them; if it is left by an error, those that have not begun
    are dropped, and whoever waits for the store gives up.

    Args:
        store: where they put them.
        reporter: told how many bytes are still to go once all is made.
    """

    def __init__(self, store: ObjectStore, reporter: Reporter) -> None:
        self._store = store
        self._reporter = reporter
        self._pool = ThreadPoolExecutor(_AT_A_TIME, "upload")
        self._running: dict[Future[None], int] = {}

    def begin(self, put: Callable[[], None], nbytes: int) -> None:
        """Begins a call.

        Args:
            put: puts something there.
            nbytes: that it will put there.

        Raises:
            StoreError: an earlier one failed for good, so that going on makes no sense.
        """
        for future in list(self._running):
            if future.done():
                future.result()
        self._running[self._pool.submit(put)] = nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._end()
            return
        try:
            left = {future: size for future, size in self._running.items() if not future.done()}
            if left:
                with self._reporter.task("upload", sum(left.values())) as task:
                    waiting = set(left)
                    while waiting:
                        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                        for future in done:
                            future.result()
                            task.advance(left[future])
            for future in self._running:
                if future.done():
                    future.result()
        finally:
            self._end()

    def _end(self) -> None:
        self._store.stop.set()
        self._pool.shutdown(cancel_futures=True)
        self._store.stop.clear()
