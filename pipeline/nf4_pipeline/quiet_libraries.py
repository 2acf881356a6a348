"""Keeps noise of the libraries underneath away from the user.

What is silenced is what a user can neither act on nor needs to know; everything else passes.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

# bitsandbytes logs at import that a hub of optional kernels is not installed, on CPUs with AVX512.
# transformers logs load reports and progress of its own; errors still pass.
_LOGGERS: Final = (
    "bitsandbytes.backends.cpu.ops",
    "transformers",
    "accelerate",
    "torch.distributed",
)


def quiet_libraries() -> None:
    """Silences the libraries underneath for the whole process; only programs call this."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silences progress bars and log lines of libraries while a model is loaded or runs."""
    from transformers.utils import logging as transformers_logging

    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
