"""How many threads of the CPU an operation of torch gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_SMALL: Final = 256 * 2**20
"""Bytes of a model whose operations are over before other threads have begun to help: with two
threads the sample takes several times the processor time, and longer, than with one."""


@contextmanager
def one_thread_if_small(nbytes: int) -> Iterator[None]:
    """Gives torch one thread while a small model computes.

    Args:
        nbytes: of the model's parameters.
    """
    with one_thread_if(nbytes < _SMALL):
        yield


@contextmanager
def one_thread_if(wanted: bool) -> Iterator[None]:
    """Gives torch one thread while the body runs, or as many as before."""
    import torch

    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
