"""Checkpoint + recipe -> what every file of the artifact must hash to, without writing it."""

from __future__ import annotations

from dataclasses import dataclass

from nf4_pipeline.checkpoint.shards import (
    Shard,
    name_shards,
    piece_layout,
    split_tensors,
    tensor_facts,
)
from nf4_pipeline.checkpoint.sink import WrittenFile, hashing
from nf4_pipeline.engine.quantize_checkpoint import CheckpointPlanner, QuantizationRun
from nf4_pipeline.engine.scheduler import Output, QuantizedFile
from nf4_pipeline.machine import Machine
from nf4_pipeline.nf4.rounding import Rounding
from nf4_pipeline.progress import Reporter
from nf4_pipeline.selection import Plan


@dataclass(frozen=True)
class Derived:
    """The weight files of an artifact as its source and recipe make them.

    Attributes:
        run: what makes them.
        outputs: the weight files, by name, in their order.
        written: what each of them hashes to, by name.
        relative_rmse: of each quantized weight, by name.
    """

    run: QuantizationRun
    outputs: dict[str, Output]
    written: dict[str, WrittenFile]
    relative_rmse: dict[str, float]

    @property
    def shards(self) -> list[Shard]:
        return [
            Shard(name, self.written[name].digest, tensor_facts(self.written[name]))
            for name in self.outputs
        ]


@dataclass(frozen=True)
class Derivation:
    """Quantizes a checkpoint into hashes.

    Memory is that of the engine and of what came before its turn (`sink.HELD_BYTES`).

    Attributes:
        planner: of the checkpoint.
        rounding: how codes and scales are chosen.
        kept: modules that calibration left in 16 bit.
        max_shard_bytes: of tensors in one file.
        machine: threads and memory.
    """

    planner: CheckpointPlanner
    rounding: Rounding
    kept: frozenset[str]
    max_shard_bytes: int
    machine: Machine

    def derive(self, reporter: Reporter) -> Derived:
        """Does the work.

        Raises:
            SourceError: the checkpoint is not usable.
        """

        def work(plan: Plan) -> Derived:
            run = QuantizationRun(self.planner.checkpoint, plan, self.rounding, self.machine)
            outputs = plan_outputs(plan, self.max_shard_bytes)
            made: dict[str, QuantizedFile] = {}
            run.make(
                "derive",
                outputs,
                lambda output: hashing(output.layout),
                made.__setitem__,
                reporter,
            )
            return Derived(
                run,
                {output.name: output for output in outputs},
                {name: file.written for name, file in made.items()},
                {name: rmse for file in made.values() for name, rmse in file.relative_rmse.items()},
            )

        return self.planner.run(work, reporter, self.kept)


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
            pieces.append((tensors, layout))
            continue
        owner = {stored.name: tensor for tensor in tensors for stored in tensor.stored}
        for group in groups:
            owners = tuple(dict.fromkeys(owner[part.name] for part in group))
            pieces.append((owners, piece_layout(group)))
    names = name_shards(len(pieces))
    return [Output(name, *piece) for name, piece in zip(names, pieces, strict=True)]
