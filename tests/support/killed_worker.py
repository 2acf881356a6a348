"""The worker that runs the artifact, killed by the system in the middle of its work."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from nf4_pipeline.progress import Reporter, SilentReporter, Task
from nf4_pipeline.verification import artifact_worker
from nf4_pipeline.verification.messages import ArtifactReply, ArtifactRequest

prepare = artifact_worker.prepare


def run(request: ArtifactRequest, reporter: Reporter) -> ArtifactReply:
    """Does the real one's work, and dies a little way into the comparison."""
    return artifact_worker.run(request, _Killer(reporter))


class _Killer(SilentReporter):
    """A reporter that ends its process with the first step of a certain task.

    Not when the task begins: the model is then built from a config, and that is a phase with a
    message of its own.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    @contextmanager
    def task(self, title: str, total: int | None, *, unit: str = "bytes") -> Iterator[Task]:
        with self._reporter.task(title, total, unit=unit) as task:
            yield _Last(task) if title == "compare block by block" else task


class _Last:
    def __init__(self, task: Task) -> None:
        self._task = task

    def advance(self, amount: int) -> None:
        self._task.advance(amount)
        os.kill(os.getpid(), signal.SIGKILL)
