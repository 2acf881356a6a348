"""Asks for the architecture and the tokenizer of a checkpoint in a process of its own.

Importing torch and transformers takes seconds and half a gigabyte, and building a model on the meta
device needs both. A child process does it, while this one hashes or reads; afterwards nothing of it
is left in memory. It has limits, because a hostile config that passes for plausible must not take
the machine with it.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from nf4_pipeline.documents import Document
from nf4_pipeline.errors import ArchitectureError
from nf4_pipeline.model.architecture import Architecture
from nf4_pipeline.model.tokenizer_facts import TokenizerFacts
from nf4_pipeline.processes.messages import Limits
from nf4_pipeline.processes.parent_side import ChildFailed, start
from nf4_pipeline.processes.worker import Worker

_PROCESSOR_SECONDS: Final = 240
"""Models of some hundred billion weights take less than one minute."""

_DATA_BYTES: Final = 8 * 2**30
"""torch and transformers take half a GiB, a model without weights hardly anything."""


@dataclass(frozen=True)
class ProbeRequest(Document):
    """Which checkpoint folder is meant."""

    folder: Path


@dataclass(frozen=True)
class ProbeReply(Document):
    """What transformers says of a checkpoint.

    Attributes:
        architecture: of its model.
        tokenizer: how it loads.
    """

    architecture: Architecture
    tokenizer: TokenizerFacts


WORKER: Final[Worker[ProbeRequest, ProbeReply]] = Worker(
    "nf4_pipeline.model.probe_worker",
    ProbeReply,
    Limits(processor_seconds=_PROCESSOR_SECONDS, data_bytes=_DATA_BYTES),
)


class Probe:
    """A child process that builds the model of a checkpoint on the meta device.

    Args:
        folder: the checkpoint.
        worker: what does it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        worker: Worker[ProbeRequest, ProbeReply] = WORKER,
    ) -> None:
        self._folder = folder
        self._limits = worker.limits
        self._child = start(worker, ProbeRequest(folder))

    @property
    def is_replying(self) -> bool:
        """True if `wait` takes no longer than reading the reply."""
        return self._child.is_speaking

    def wait(self) -> ProbeReply:
        """What it found.

        Raises:
            ArchitectureError: the config makes no causal LM, or building it took too long.
            SourceError: a file of the checkpoint is missing or malformed.
        """
        try:
            with self._child as child:
                return child.wait()
        except ChildFailed as failure:
            if failure.status == -signal.SIGXCPU:
                raise ArchitectureError(
                    f"Building the model of {self._folder} without weights took more than "
                    f"{self._limits.processor_seconds} s of processor time, which no real "
                    "config.json needs."
                ) from failure
            raise ArchitectureError(
                f"The process that builds the model of {self._folder} on the meta device ended "
                f"with status {failure.status}: {failure.cause}."
            ) from failure

    def cancel(self) -> None:
        """Ends the child; for when something else already failed."""
        self._child.close()


def transformers_version() -> str:
    """The version that architectures depend on, without importing it."""
    return version("transformers")
