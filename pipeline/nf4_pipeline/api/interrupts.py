"""Ctrl-C, as a Python program expects it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nf4_pipeline.errors import StoppedError


@contextmanager
def interruptible() -> Iterator[None]:
    """Lets an interrupt leave the body as one.

    A stage says it as an error of ours, with what is kept. A program that goes on after any
    `PipelineError`, with the next model of a list, would go on after Ctrl-C, too.

    Raises:
        KeyboardInterrupt: the user stopped the work; the text says what is kept.
    """
    try:
        yield
    except StoppedError as stopped:
        raise KeyboardInterrupt(str(stopped)) from None
