"""The same numbers from a model each time: what torch otherwise leaves to chance.

On a GPU some kernels add in whatever order their threads come. Among them is cuDNN's attention,
which torch prefers on an H100 or H200: for a token that sees more than 128 others it computes other
bits each time (torch 2.11), so that a model writes another text from the same seed.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from nf4_pipeline.runtime.threads import one_thread_if

_CUBLAS: Final = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(device: Any, *, strict: bool = False) -> Iterator[None]:
    """While the body runs, a model adds in one order, whatever the machine's number of cores.

    On a CPU each operation has one thread: how sums are cut depends on how many there are.

    Args:
        device: where it computes: a torch device or its name.
        strict: see `deterministic_on_gpu`.
    """
    import torch

    on_cpu = torch.device(device).type == "cpu"
    with one_thread_if(on_cpu), deterministic_on_gpu(device, strict=strict):
        yield


@contextmanager
def deterministic_on_gpu(device: Any, *, strict: bool = False) -> Iterator[None]:
    """While the body runs, kernels of a GPU add in one order; on a CPU it does nothing.

    It holds for the whole process until the last of those that entered has left, in any order:
    models that pass block by block take turns in the midst of it.

    Args:
        device: where a model computes: a torch device or its name.
        strict: torch raises RuntimeError where an operation has no such kernel. Else it takes
            another one, as it does for the gradient of attention: for forward passes alone.
    """
    import torch

    if torch.device(device).type == "cpu":
        yield
        return
    _SHARED.enter()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if strict and warns:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        if strict and warns:
            torch.use_deterministic_algorithms(True, warn_only=True)
        _SHARED.leave()


class _Shared:
    """torch's modes, which a process has once, and how many of its parts ask for them."""

    def __init__(self) -> None:
        self._entered = 0
        self._undo = ExitStack()
        self._changing = threading.Lock()

    def enter(self) -> None:
        with self._changing:
            if not self._entered:
                with ExitStack() as undo:
                    _ask_for_one_order(undo)
                    self._undo = undo.pop_all()
            self._entered += 1

    def leave(self) -> None:
        with self._changing:
            self._entered -= 1
            if not self._entered:
                self._undo.close()


_SHARED: Final = _Shared()


def _ask_for_one_order(undo: ExitStack) -> None:
    """Sets the modes, and has the stack set them as they were."""
    import torch

    backends: Any = torch.backends.cuda
    fill: Any = torch.utils.deterministic
    undo.callback(
        torch.use_deterministic_algorithms,
        torch.are_deterministic_algorithms_enabled(),
        warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    undo.callback(setattr, fill, "fill_uninitialized_memory", fill.fill_uninitialized_memory)
    undo.callback(backends.enable_cudnn_sdp, backends.cudnn_sdp_enabled())
    if _CUBLAS not in os.environ:
        os.environ[_CUBLAS] = ":4096:8"
        undo.callback(os.environ.pop, _CUBLAS, None)
    undo.enter_context(warnings.catch_warnings())
    # Said by the thread that goes backward, which then takes the context that there is.
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
    warnings.filterwarnings("ignore", ".*does not have a deterministic implementation")
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill.fill_uninitialized_memory = False  # what is empty is written before it is read
    backends.enable_cudnn_sdp(False)
