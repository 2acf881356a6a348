"""Asks for the facts of a model in a process of its own.

Importing torch and transformers takes seconds and half a gigabyte, and building a model on the meta
device needs both. A child process does it, while this one hashes or reads; afterwards nothing of it
is left in memory.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

from nf4_pipeline import errors
from nf4_pipeline.errors import ArchitectureError
from nf4_pipeline.model import probe_worker as worker
from nf4_pipeline.model.architecture import ModelFacts
from nf4_pipeline.model.tokenizer_facts import TokenizerFacts


class PendingFacts:
    """A child process that builds the model on the meta device, and loads its tokenizer.

    Args:
        folder: the checkpoint.
        without_weights: there are none yet, and nothing is said of them.
    """

    def __init__(self, folder: Path, *, without_weights: bool = False) -> None:
        self._folder = folder
        self._child = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "nf4_pipeline.model.probe_worker", str(folder)),
                *([worker.WITHOUT_WEIGHTS] if without_weights else []),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._said = ("", "")
        # An answer is longer than a pipe holds; somebody must take it for the child to end.
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        self._said = self._child.communicate()

    @property
    def answered(self) -> bool:
        """True if `wait` will not wait."""
        return not self._reader.is_alive()

    def wait(self) -> tuple[ModelFacts, TokenizerFacts]:
        """What was found.

        Raises:
            SourceError: the config makes no causal LM, or a weight file is malformed.
        """
        try:
            self._reader.join()
        except BaseException:
            self.cancel()
            raise
        out, err = self._said
        if self._child.returncode == -signal.SIGXCPU:
            raise ArchitectureError(
                f"Building the model of {self._folder} without weights took more than "
                f"{worker.MAX_SECONDS} s of processor time, which no real config.json needs."
            )
        if self._child.returncode != 0:
            tail = "; ".join(err.strip().splitlines()[-3:]) or "no message"
            raise ArchitectureError(
                f"The process that builds the model of {self._folder} on the meta device ended "
                f"with status {self._child.returncode}: {tail}"
            )
        answer: dict[str, Any] = json.loads(out)
        if "error" in answer:
            raise getattr(errors, answer["kind"])(answer["error"])
        return (
            ModelFacts.from_json(answer["model"]),
            TokenizerFacts.from_json(answer["tokenizer"]),
        )

    def cancel(self) -> None:
        """Ends the child; for when something else already failed."""
        self._child.kill()
        self._reader.join()


def transformers_version() -> str:
    """The version that the facts depend on, without importing it."""
    return version("transformers")
