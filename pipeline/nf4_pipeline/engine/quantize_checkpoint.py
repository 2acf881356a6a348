"""A checkpoint, planned and run through the engine; what serialize and reproduce have in common.

CheckpointPlanner   headers + architecture + recipe -> plan; another if tied tensors differ
QuantizationRun     plan + rounding + machine -> the engine, with its threads and its memory
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

from nf4_pipeline.checkpoint.source import Checkpoint
from nf4_pipeline.engine.buffers import divide
from nf4_pipeline.engine.chunks import Source
from nf4_pipeline.engine.scheduler import Opener, Output, QuantizedFile, make_files
from nf4_pipeline.engine.tied_weights import equals_twin
from nf4_pipeline.errors import TiedWeightsDiffer
from nf4_pipeline.machine import Machine
from nf4_pipeline.model.architecture import Architecture
from nf4_pipeline.nf4.compiling import compilation_shown
from nf4_pipeline.nf4.rounding import Rounding
from nf4_pipeline.progress import Reporter, Task
from nf4_pipeline.recipe import QuantizeRecipe
from nf4_pipeline.selection import Plan, select

T = TypeVar("T")


@dataclass(frozen=True)
class CheckpointPlanner:
    """Plans what happens to each tensor, from headers and the architecture alone.

    Attributes:
        checkpoint: the source.
        architecture: of its model.
        recipe: which modules to skip.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    recipe: QuantizeRecipe

    def plan(
        self,
        *,
        untied: frozenset[str] = frozenset(),
        sensitive: frozenset[str] = frozenset(),
    ) -> Plan:
        """The plan.

        Args:
            untied: tied tensors that are known to differ from what they are tied to.
            sensitive: modules that stay in 16 bit for what they would lose.

        Raises:
            SourceError: the checkpoint does not fit its config, or nothing in it can be quantized.
        """
        return select(
            self.checkpoint.tensors,
            self.architecture,
            self.recipe,
            untied=untied,
            sensitive=sensitive,
        )

    def find_untied(self, reporter: Reporter) -> frozenset[str]:
        """Tied tensors to keep, since they differ from their twins; found by reading both.

        `run` finds it out as it copies one of them. Where several processes make a part each, only
        one of them does, and all must work by the same plan.

        Raises:
            SourceError: the checkpoint does not fit its config, or cannot be read.
        """
        plan = self.plan()
        tied = [tensor for tensor in plan.tensors if tensor.tied_to is not None]
        with reporter.task("compare tied weights", None) if tied else nullcontext():
            differ = not all(equals_twin(tensor, self.checkpoint) for tensor in tied)
        return frozenset(tensor.source.name for tensor in tied) if differ else frozenset()

    def run(
        self,
        work: Callable[[Plan], T],
        reporter: Reporter,
        sensitive: frozenset[str] = frozenset(),
        untied: frozenset[str] = frozenset(),
    ) -> T:
        """Works by the plan; once more, by another one, if tied tensors turn out to differ.

        Rare: config.json says that tensors are tied which the checkpoint stores as different.

        Args:
            work: quantizes by a plan.
            reporter: told that it starts again.
            sensitive: as in `plan`.
            untied: as in `plan`, as far as that is known.
        """
        plan = self.plan(sensitive=sensitive, untied=untied)
        try:
            return work(plan)
        except TiedWeightsDiffer as error:
            reporter.note(f"{error} Both are kept; starting again.")
        different = frozenset(t.source.name for t in plan.tensors if t.tied_to is not None)
        return work(self.plan(untied=different, sensitive=sensitive))


@dataclass(frozen=True)
class QuantizationRun:
    """The engine on one checkpoint, by one plan.

    Attributes:
        checkpoint: the source.
        plan: what happens to each tensor.
        rounding: how codes and scales are chosen.
        machine: gives threads and memory.
    """

    checkpoint: Checkpoint
    plan: Plan
    rounding: Rounding
    machine: Machine

    def make(
        self,
        title: str,
        outputs: Sequence[Output],
        opener: Opener,
        done: Callable[[str, QuantizedFile], None],
        reporter: Reporter,
    ) -> None:
        """Makes files.

        Args:
            title: of the task that the reporter shows.
            outputs: the files.
            opener: gives what takes the bytes of a file.
            done: told of each file once it is whole; one call at a time.
            reporter: told how far it is, in source bytes.

        Raises:
            CheckpointError: a weight is not finite, or a file became shorter while it was read.
            TiedWeightsDiffer: a tensor was to be dropped and does not equal its twin.
        """
        with self.shown(title, outputs, reporter) as task:
            self.make_within(task, outputs, opener, done)

    @contextmanager
    def shown(self, title: str, outputs: Sequence[Output], reporter: Reporter) -> Iterator[Task]:
        """A task for `make_within`, as large as the tensors that these files are made of."""
        total = sum(t.source.header.nbytes for output in outputs for t in output.tensors)
        with compilation_shown(reporter), reporter.task(title, total) as task:
            yield task

    def make_within(
        self,
        task: Task,
        outputs: Sequence[Output],
        opener: Opener,
        done: Callable[[str, QuantizedFile], None],
        passing: Source | None = None,
    ) -> None:
        """Makes files, in a task that may go on after them; see `make`.

        Args:
            passing: gives the bytes of the one checkpoint file that all of them are made of, as
                they pass by; None to read files of the checkpoint.
        """
        make_files(
            self.checkpoint,
            self.plan,
            outputs,
            opener,
            done,
            rounding=self.rounding,
            budget=divide(
                self.machine.memory_budget,
                self.machine.workers or self.rounding.workers,
                self.rounding.max_chunk_bytes,
            ),
            task=task,
            passing=passing,
        )
