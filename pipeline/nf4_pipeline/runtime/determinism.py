"""The same numbers from a model each time: what torch otherwise leaves to chance.

On a GPU some kernels add in whatever order their threads come. Among them is cuDNN's attention,
which torch prefers on an H100 or H200: of a token that sees more than 128 others it computes other
bits each time (torch 2.11), so that a model writes another text from the same seed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

_CUBLAS: Final = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(device: Any, *, strict: bool = False) -> Iterator[None]:
    """While the body runs, the same sums each time, whatever the machine's number of cores.

    Args:
        device: where a model computes: a torch device or its name.
        strict: see `deterministic_kernels`.
    """
    with _one_thread(device), deterministic_kernels(device, strict=strict):
        yield


@contextmanager
def _one_thread(device: Any) -> Iterator[None]:
    """One thread for each operation of a CPU: how sums are cut depends on how many there are."""
    import torch

    before = torch.get_num_threads()
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic_kernels(device: Any, *, strict: bool = False) -> Iterator[None]:
    """While the body runs, a GPU's kernels are those that add in one order; nothing for a CPU.

    Args:
        device: where a model computes: a torch device or its name.
        strict: torch raises RuntimeError where an operation has no such kernel, and gradients of
            attention are such, too; else another one is taken.
    """
    import torch

    if torch.device(device).type == "cpu":
        yield
        return
    fill: Any = torch.utils.deterministic
    attention: Any = torch.backends.cuda
    enabled = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills, prefers_cudnn = fill.fill_uninitialized_memory, attention.cudnn_sdp_enabled()
    known = os.environ.get(_CUBLAS)
    os.environ.setdefault(_CUBLAS, ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    fill.fill_uninitialized_memory = False  # what is empty is written before it is read
    attention.enable_cudnn_sdp(False)
    try:
        with warnings.catch_warnings():
            # Said by the thread that goes backward, which then takes the context that there is.
            warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
            if not strict:
                warnings.filterwarnings("ignore", ".*deterministic", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        fill.fill_uninitialized_memory = fills
        attention.enable_cudnn_sdp(prefers_cudnn)
        if known is None:
            os.environ.pop(_CUBLAS, None)
