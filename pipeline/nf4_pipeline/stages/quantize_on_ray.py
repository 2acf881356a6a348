"""source/ -> quantized/ by tasks of a Ray cluster, one for each file; then one record."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.checkpoint.atomic import make_folder
from nf4_pipeline.cluster.ray_tasks import Claim, connected
from nf4_pipeline.engine.parts import Part
from nf4_pipeline.errors import ResourceError
from nf4_pipeline.machine import Machine
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import DOWNLOAD, QUANTIZE, QuantizeFacts
from nf4_pipeline.resource_usage import measured
from nf4_pipeline.stages.folder_progress import watched
from nf4_pipeline.stages.quantize import Quantize, check_memory, remove_other_files
from nf4_pipeline.stages.quantize_parts import MergeParts, QuantizePart, refuse_streamed
from nf4_pipeline.stages.rounding_choice import estimate

_TASKS_A_GPU: Final = 2
"""While one file is hashed to its end and synced, the GPU goes on with another."""
_MOST_CPUS: Final = 8
"""Of one task, unless --workers says more: one stream of sha256 follows no more of them."""
_PATIENCE: Final = 120.0
"""Seconds that a task waits for the one before it, whose node Ray thinks dead and which still
runs."""


@dataclass(frozen=True)
class QuantizeOnRay:
    """Has each file made as a part of its own, wherever in the cluster, and completes the record.

    Attributes:
        whole: the stage that the parts are of; its build folder must be `locked`.
    """

    whole: Quantize

    kind: ClassVar = QUANTIZE

    def key(self) -> str:
        """That of the whole stage.

        Raises:
            BuildError: download is not done.
            RecipeError: the calibration text cannot be read.
        """
        return self.whole.key()

    def run(self) -> Record[QuantizeFacts]:
        """Does the work.

        Raises:
            BuildError: download is not done, or the source changed since, or while it was read.
            SourceError: the checkpoint is not usable.
            ResourceError: the disk is too full, there is too little memory, or the cluster cannot
                be reached, or lost too many workers.
            UsageError: the source is streamed, the memory budget is too small, or Ray is not
                installed.
            PlanMismatchError: the bytes written are not the bytes planned.
        """
        whole = self.whole
        refuse_streamed(whole.build, "--engine ray")
        whole.build.check_inputs(DOWNLOAD)
        planner = whole.planner()
        untied = planner.find_untied(whole.reporter)
        plan = planner.plan(untied=untied)
        whole.check_disk(plan)
        check_memory(plan, whole.machine.memory_budget)
        sizes = {file: layout.nbytes for file, layout in plan.layouts().items()}
        make_folder(whole.build.quantized)
        remove_other_files(whole.build.quantized, sizes)
        with measured() as usage, ExitStack() as stack:
            with whole.reporter.task("connect to Ray", None):
                cluster = stack.enter_context(connected(whole.machine.ray_address))
            claim = claim_of(
                whole.machine,
                cluster.cpus,
                cluster.gpus,
                files=len(sizes),
                source_bytes=planner.checkpoint.nbytes,
            )
            # What shapes no byte may differ from node to node.
            machine = replace(
                whole.machine,
                device="cuda" if claim.gpus else "cpu",
                workers=whole.machine.workers if claim.gpus else claim.cpus,
                engine="local",
                ray_address=None,
            )
            order = Order(
                root=whole.build.root.absolute(),
                recipe=whole.recipe,
                machine=machine,
                untied=untied,
                key=whole.key(),
            )
            parts = [Part(len(sizes), number + 1) for number in range(len(sizes))]
            calls = [partial(make_file, order, part) for part in parts]
            with (
                whole.build.lent(),
                watched(whole.build, order.key, sizes, whole.reporter) as check,
            ):
                cluster.run(calls, claim, check)
        return MergeParts(whole).run(usage)


def claim_of(machine: Machine, cpus: int, gpus: int, *, files: int, source_bytes: int) -> Claim:
    """What a task takes.

    Args:
        machine: what was asked for; "auto" takes GPUs where each of them, with its share of the
            processors and of the source, is faster than these processors alone by `estimate`.
        cpus: of the cluster.
        gpus: of the cluster.
        files: how many tasks there are.
        source_bytes: of the weights that they read, all together.
    """
    if machine.device == "cuda" or (
        machine.device == "auto"
        and gpus > 0
        and estimate(source_bytes // gpus, max(1, cpus // gpus), cuda_begun=False).cuda_pays
    ):
        return Claim(cpus=1, gpus=1 / _TASKS_A_GPU)
    return Claim(cpus=machine.workers or max(1, min(_MOST_CPUS, cpus // files)))


@dataclass(frozen=True)
class Order:
    """What every task of one run is told.

    Attributes:
        root: of the build folder, as all nodes see it.
        recipe: everything that shapes the bytes.
        machine: what a task may use.
        untied: tied tensors that differ.
        key: that the stage has here.
    """

    root: Path
    recipe: Recipe
    machine: Machine
    untied: frozenset[str]
    key: str


def make_file(order: Order, part: Part) -> None:
    """A task: makes one file, unless it is there.

    Raises:
        PipelineError: as of `QuantizePart.ensure`.
        ResourceError: the node does not see the build folder, or has another version of this
            package.
    """
    if not order.root.is_dir():
        raise ResourceError(
            f"{order.root} is not there on {socket.gethostname()}: all nodes of the Ray cluster "
            "must see the build folder and the source by the same paths. Name a --build-dir on a "
            "file system that they share."
        )
    whole = Quantize(Build(order.root), order.recipe, order.machine, SILENT)
    if whole.key() != order.key:
        raise ResourceError(
            f"{socket.gethostname()} would make other files than the host that asked for them: "
            "another version of nf4-pipeline is installed there. Install the same one on each node."
        )
    QuantizePart(whole, part, order.untied, _PATIENCE).ensure()
