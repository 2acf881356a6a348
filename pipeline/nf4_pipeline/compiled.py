"""Functions that numba compiles, and keeps compiled on disk where it can.

The cache saves seconds and no more: a folder that is full or read-only, a machine on which this
user may write nowhere, or files in it that somebody damaged cost a compilation, never the work.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from nf4_pipeline.errors import UsageError

try:
    from numba import njit
except (ValueError, TypeError) as error:  # it reads the environment when it is imported
    raise UsageError(
        f"numba refuses a setting of this environment: {str(error).rstrip('.')}. Look at those of "
        "its variables that are set (env | grep NUMBA)."
    ) from error


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compiles a function at its first call; it does not hold the GIL.

    Args:
        options: further ones of `numba.njit`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        made = njit(nogil=True, **options)(function)
        if hasattr(made, "enable_caching"):  # else NUMBA_DISABLE_JIT gives the function back
            with suppress(RuntimeError, OSError):  # numba found no folder to write to
                made.enable_caching()
                made._cache = _Forgiving(made._cache)
        return made

    return decorate


class _Forgiving:
    """A cache of numba's for which no failure of a file matters."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def load_overload(self, *about: Any) -> Any:
        """What was kept; None if nothing was, or nothing that can be read."""
        try:
            return self._cache.load_overload(*about)
        except Exception:  # what unpickling a damaged file ends with
            with suppress(Exception):
                self._cache.flush()  # else what is saved now is not found next time
            return None

    def save_overload(self, *about: Any) -> None:
        """Keeps what was compiled."""
        with suppress(Exception):
            self._cache.save_overload(*about)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
