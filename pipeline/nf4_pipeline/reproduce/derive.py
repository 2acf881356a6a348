"""Checkpoint + recipe -> what every file of the artifact must hash to, without writing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.shards import (
    Shard,
    name_shards,
    piece_layout,
    split_tensors,
    tensor_facts,
)
from nf4_pipeline.checkpoint.sink import Sink, WrittenFile, hashing
from nf4_pipeline.checkpoint.source import Checkpoint
from nf4_pipeline.engine.buffers import divide
from nf4_pipeline.engine.scheduler import Output, QuantizedFile, make_files
from nf4_pipeline.engine.tied import TwinsDifferError
from nf4_pipeline.nf4.rounding import NearestOnCpu, Rounding
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.selection import Plan
from nf4_pipeline.stages import Settings
from nf4_pipeline.stages.calibrate import Calibration, kept_modules
from nf4_pipeline.stages.quantize import make_plan


@dataclass(frozen=True)
class Derived:
    """The weight files of an artifact as its source and recipe make them.

    Attributes:
        checkpoint: the source.
        plan: what happened to each tensor.
        outputs: the weight files, by name, in their order.
        written: what each of them hashes to, by name.
        relative_rmse: of each quantized weight, by name.
        rounding: how codes and scales are chosen.
    """

    checkpoint: Checkpoint
    plan: Plan
    outputs: dict[str, Output]
    written: dict[str, WrittenFile]
    relative_rmse: dict[str, float]
    rounding: Rounding

    @property
    def shards(self) -> list[Shard]:
        return [
            Shard(name, self.written[name].digest, tensor_facts(self.written[name]))
            for name in self.outputs
        ]


def derive(
    build: Build, settings: Settings, reporter: Reporter, chosen: Calibration | None = None
) -> Derived:
    """Quantizes a build's checkpoint into hashes.

    Memory is that of the engine and of what came before its turn (`sink.HELD_BYTES`).

    Args:
        build: whose download is done.
        settings: the recipe, the threads and the memory.
        reporter: told how far it is.
        chosen: calibrated codes and scales; None to round to nearest.

    Raises:
        SourceError: the checkpoint is not usable.
    """
    rounding = NearestOnCpu() if chosen is None else chosen.rounding()
    kept = kept_modules(chosen.kept if chosen else ())
    plan, checkpoint = make_plan(build, settings, sensitive=kept)
    try:
        return _derive(plan, checkpoint, rounding, settings, reporter)
    except TwinsDifferError as error:
        reporter.note(f"{error} Both are kept; starting again.")
    different = frozenset(t.source.name for t in plan.tensors if t.tied_to is not None)
    plan, checkpoint = make_plan(build, settings, different, kept)
    return _derive(plan, checkpoint, rounding, settings, reporter)


def _derive(
    plan: Plan, checkpoint: Checkpoint, rounding: Rounding, settings: Settings, reporter: Reporter
) -> Derived:
    outputs = plan_outputs(plan, settings.recipe.serialize.max_shard_bytes)
    found: dict[str, QuantizedFile] = {}
    run_engine(
        checkpoint,
        plan,
        outputs,
        lambda output: hashing(output.layout),
        found.__setitem__,
        rounding,
        settings,
        reporter,
    )
    return Derived(
        checkpoint,
        plan,
        {output.name: output for output in outputs},
        {name: file.written for name, file in found.items()},
        {name: value for file in found.values() for name, value in file.relative_rmse.items()},
        rounding,
    )


def plan_outputs(plan: Plan, limit: int) -> list[Output]:
    """The weight files that serialize leaves.

    Args:
        plan: what happens to each tensor.
        limit: bytes of tensors in one file.
    """
    pieces = []
    for file, layout in plan.layouts().items():
        tensors = plan.files()[file]
        together = [tensor.stored for tensor in tensors]
        groups = split_tensors(layout.tensors, layout.nbytes, limit, together)
        if len(groups) == 1:
            pieces.append((file, tensors, layout))
            continue
        owner = {stored.name: tensor for tensor in tensors for stored in tensor.stored}
        for group in groups:
            owners = tuple(dict.fromkeys(owner[part.name] for part in group))
            pieces.append((file, owners, piece_layout(group)))
    names = name_shards(len(pieces))
    return [Output(name, *piece) for name, piece in zip(names, pieces, strict=True)]


def run_engine(
    checkpoint: Checkpoint,
    plan: Plan,
    outputs: Sequence[Output],
    opener: Callable[[Output], AbstractContextManager[Sink]],
    done: Callable[[str, QuantizedFile], None],
    rounding: Rounding,
    settings: Settings,
    reporter: Reporter = SILENT,
) -> None:
    """Makes files, with the threads and the memory that the settings give."""
    workers = settings.workers or rounding.workers
    with reporter.task("derive", source_bytes(outputs)) as task:
        make_files(
            checkpoint,
            plan,
            outputs,
            opener,
            done,
            rounding=rounding,
            budget=divide(settings.memory_budget, workers, rounding.max_chunk_bytes),
            task=task,
        )


def source_bytes(outputs: Iterable[Output]) -> int:
    """What must be read to make some files."""
    return sum(tensor.source.header.nbytes for output in outputs for tensor in output.tensors)
