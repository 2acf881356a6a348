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
from typing import Any

from nf4_pipeline import errors
from nf4_pipeline.errors import ArchitectureError
from nf4_pipeline.model import probe_worker as worker
from nf4_pipeline.model.architecture import ModelFacts


class PendingFacts:
    """A child process that builds the model on the meta device.

    Args:
        folder: the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "nf4_pipeline.model.probe_worker", str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> ModelFacts:
        """The facts.

        Raises:
            SourceError: the config makes no causal LM, or a weight file is malformed.
        """
        try:
            out, err = self._child.communicate()
        except BaseException:
            self.cancel()
            raise
        if self._child.returncode == -signal.SIGXCPU:
            raise ArchitectureError(
                f"Building the model of {self._folder} without weights took more than "
                f"{worker.MAX_SECONDS} s of processor time, which no real config.json needs."
            )
        if self._child.returncode != 0:
            tail = (err.strip().splitlines() or ["no message"])[-1]
            raise ArchitectureError(
                f"The process that builds the model of {self._folder} on the meta device ended "
                f"with status {self._child.returncode}: {tail}"
            )
        answer: dict[str, Any] = json.loads(out)
        if "error" in answer:
            raise getattr(errors, answer["kind"])(answer["error"])
        return ModelFacts.from_json(answer)

    def cancel(self) -> None:
        """Ends the child; for when something else already failed."""
        self._child.kill()
        self._child.communicate()


def transformers_version() -> str:
    """The version that the facts depend on, without importing it."""
    return version("transformers")
