"""source/ -> quantized/ by tasks of a Ray cluster, one for each file; then one record.

Where a build is kept at a URL, tasks need not see the build folder: each works in one of its own,
and puts its file there. A calibrated model is one task, since calibration is one walk through it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.calibration import calibrator
from nf4_pipeline.checkpoint.atomic import make_folder
from nf4_pipeline.cluster.ray_tasks import Claim, Cluster, connected
from nf4_pipeline.cluster.seen_folders import check_seen, dangling
from nf4_pipeline.engine.parts import Part
from nf4_pipeline.errors import ResourceError, TiedWeightsDiffer, UsageError
from nf4_pipeline.machine import Machine
from nf4_pipeline.processes.temporary import TemporaryFolder
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import DOWNLOAD, QUANTIZE, QuantizeFacts, forget_parts, part_kind
from nf4_pipeline.resource_usage import measured
from nf4_pipeline.selection import Plan
from nf4_pipeline.stages import quantize
from nf4_pipeline.stages.folder_progress import watched
from nf4_pipeline.stages.quantize import (
    FACTS_SUFFIX,
    Quantize,
    check_memory,
    read_facts,
    remove_other_files,
)
from nf4_pipeline.stages.quantize_parts import MergeParts, QuantizePart
from nf4_pipeline.stages.rounding_choice import estimate
from nf4_pipeline.stages.sent_source import SentSource
from nf4_pipeline.stages.streamed_source import StreamedSource

_TASKS_A_GPU: Final = 2
"""While one file is hashed to its end and synced, the GPU goes on with another."""
_MOST_CPUS: Final = 8
"""Of one task, unless --workers says more: one stream of sha256 follows no more of them."""
_PATIENCE: Final = 120.0
"""Seconds that a task waits for the one before it, whose node Ray thinks dead and which still
runs."""
_CALIBRATION: Final = "calibration"
"""What a task holds that calibrates."""


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
            HubError: the source is streamed, and the Hub does not give what it lists.
            ResourceError: the disk is too full, there is too little memory, or the cluster cannot
                be reached, or lost too many workers.
            UsageError: the recipe is a calibrated one and the build is kept at a URL, the memory
                budget is too small, or Ray is not installed.
            PlanMismatchError: the bytes written are not the bytes planned.
        """
        whole = self.whole
        whole.build.check_inputs(DOWNLOAD)
        with measured() as usage, ExitStack() as stack:
            if whole.recipe.quantize.calibrate:
                refuse_calibrated_at_url(whole.recipe, whole.build.url)
                return self._calibrate(self._connect(stack))
            planner = whole.planner()
            streamed = StreamedSource.of(whole.build, whole.reporter)
            untied = frozenset[str]() if streamed else planner.find_untied(whole.reporter)
            plan = planner.plan(untied=untied)
            if streamed is not None and not streamed.missing(plan):  # as an earlier run found out
                plan = planner.plan(untied=_differ(streamed, plan))
            whole.check_disk(plan)
            check_memory(plan, whole.machine.memory_budget)
            make_folder(whole.build.quantized)
            cluster = self._connect(stack)
            self._make_files(cluster, plan, planner.checkpoint.nbytes)
            if streamed is not None and (tied := _differ(streamed, plan)):
                whole.reporter.note("Tied tensors differ. Both are kept; starting again.")
                plan = planner.plan(untied=tied)
                forget_parts(whole.build)
                self._make_files(cluster, plan, planner.checkpoint.nbytes)
        return MergeParts(whole).run(usage)

    def _connect(self, stack: ExitStack) -> Cluster:
        with self.whole.reporter.task("connect to Ray", None):
            return stack.enter_context(connected(self.whole.machine.ray_address))

    def _make_files(self, cluster: Cluster, plan: Plan, source_bytes: int) -> None:
        """Has all files of a plan made, as far as they do not stand there, by a task each."""
        whole = self.whole
        sizes = {file: layout.nbytes for file, layout in plan.layouts().items()}
        whole.outgoing.restart()  # files of another plan may be on their way
        remove_other_files(whole.build.quantized, sizes)
        claim = claim_of(
            whole.machine,
            cluster.cpus,
            cluster.gpus,
            files=len(sizes),
            source_bytes=source_bytes,
        )
        order = self._order(claim, frozenset(plan.untied))
        items = [(Part(len(sizes), number), file) for number, file in enumerate(sizes, start=1)]
        done: set[str] = set()

        def end(item: tuple[Part, str]) -> None:
            done.add(item[1])
            target = whole.build.quantized / item[1]
            facts = read_facts(target)
            if facts is not None and target.exists():
                whole.outgoing.add(target, facts.digest)

        with (
            whole.build.lent(),
            watched(whole.build, order.key, sizes, whole.reporter, done=done) as check,
        ):
            cluster.run(partial(make_file, order), items, claim, check, end)
        whole.build.pull(whole.reporter)  # what tasks elsewhere put to the URL

    def _calibrate(self, cluster: Cluster) -> Record[QuantizeFacts]:
        """Has one task do the whole stage."""
        whole = self.whole
        claim = claim_of_all(whole.machine, cluster.largest)
        if claim.gpus:
            whole.reporter.note(
                f"Calibration takes {claim.gpus:g} GPUs of one node; it begins when they are free."
            )
        order = self._order(claim, None)
        chosen: set[Path] = set()
        whole.build.forget(QUANTIZE)  # a record that stands there later is that of a lost task
        with (
            whole.build.lent(),
            whole.reporter.task("calibrate on one node", None, unit="blocks") as task,
        ):

            def check() -> None:
                found = {*whole.build.calibration.glob("*/*.safetensors")} - chosen
                chosen.update(found)
                task.advance(len(found))

            cluster.run(make_all, [order], claim, check)
        return whole.build.need(QUANTIZE)

    def _order(self, claim: Claim, untied: frozenset[str] | None) -> Order:
        whole, build = self.whole, self.whole.build
        # What shapes no byte may differ from node to node.
        machine = replace(
            whole.machine,
            device="cuda" if claim.gpus else "cpu",
            workers=whole.machine.workers if claim.gpus else claim.cpus,
            engine="local",
            ray_address=None,
        )
        return Order(
            root=build.root.absolute(),
            url=build.url,
            sent=None if build.url is None else SentSource.of(build),
            recipe=whole.recipe,
            machine=machine,
            untied=untied or frozenset(),
            key=whole.key(),
            code=_CODE,
        )


_CODE: Final = (quantize.CODE_VERSION, calibrator.CODE_VERSION)


def refuse_calibrated_at_url(recipe: Recipe, url: str | None) -> None:
    """Refuses to calibrate on a machine that could not leave what it has chosen so far.

    Args:
        recipe: of the build.
        url: at which it is kept; None if that is a folder.

    Raises:
        UsageError: the recipe is a calibrated one, and the build is kept at a URL.
    """
    if url is not None and recipe.quantize.calibrate:
        raise UsageError(
            f"--engine ray --calibrate: what is chosen, block by block, is kept in the build "
            f"folder until all is written, so that a lost worker costs one block; {url} is a URL, "
            "and keeps none of it. Name a folder that all nodes see as --build-dir, or leave "
            "--engine ray out."
        )


def _differ(streamed: StreamedSource, plan: Plan) -> frozenset[str]:
    """Tied tensors that are kept, since they differ; known once all files have passed by.

    Files of which no task made anything are fetched for it.
    """
    for file in streamed.missing(plan):
        streamed.pass_by(file, plan)
    try:
        streamed.check_tied(plan)
    except TiedWeightsDiffer:
        return frozenset(t.source.name for t in plan.tensors if t.tied_to is not None)
    return frozenset()


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


def claim_of_all(machine: Machine, node: Claim) -> Claim:
    """What a task takes that runs the model: all GPUs of a node if it has any, else processors.

    Args:
        machine: what was asked for.
        node: all of the largest node.
    """
    if machine.device == "cuda" or (machine.device == "auto" and node.gpus > 0):
        return Claim(cpus=max(1, min(_MOST_CPUS, node.cpus)), gpus=max(1, node.gpus))
    return Claim(cpus=machine.workers or max(1, node.cpus))


@dataclass(frozen=True)
class Order:
    """What every task of one run is told.

    Attributes:
        root: of the build folder, as all nodes see it.
        url: of which it is the local copy; None if it is none.
        sent: the source, for nodes that need not see the folder; None where they must.
        recipe: everything that shapes the bytes.
        machine: what a task may use.
        untied: tied tensors that differ.
        key: that the stage has here.
        code: which version of the code makes the bytes.
    """

    root: Path
    url: str | None
    sent: SentSource | None
    recipe: Recipe
    machine: Machine
    untied: frozenset[str]
    key: str
    code: tuple[int, int]

    def check_version(self, key: str | None = None) -> None:
        """Refuses to work on a node that would make other bytes.

        Args:
            key: that the stage has on it; None if it may differ, since tokens were made meanwhile.

        Raises:
            ResourceError: another version of this package is installed there.
        """
        if (key or self.key, _CODE) != (self.key, self.code):
            raise ResourceError(
                f"{socket.gethostname()} would make other files than the host that asked for them: "
                "another version of nf4-pipeline is installed there. Install the same one on each "
                "node."
            )


def make_file(order: Order, item: tuple[Part, str]) -> None:
    """A task: makes one file, unless it is there.

    Args:
        order: as of all tasks.
        item: the part, and the name of its file.

    Raises:
        PipelineError: as of `QuantizePart.ensure`.
        ResourceError: the node sees neither the build folder nor the source, or has another version
            of this package.
    """
    part, file = item
    takes = (f"quantized/{file}{FACTS_SUFFIX}", f"records/{part_kind(part).file}.json")
    with _placed(order, takes) as build:
        whole = Quantize(build, order.recipe, order.machine, SILENT)
        order.check_version(whole.key())
        QuantizePart(whole, part, order.untied, _PATIENCE).ensure()


def make_all(order: Order) -> None:
    """A task: does the whole stage, or goes on with it.

    Raises:
        PipelineError: as of `Quantize.run`.
        ResourceError: the node does not see the build folder, or has another version of this
            package.
    """
    with _placed(order, ()) as build:
        order.check_version()
        whole = Quantize(build, order.recipe, order.machine, SILENT)
        with build.shared(_PATIENCE), build.making([_CALIBRATION], _PATIENCE):
            record = build.record(QUANTIZE)
            if record is None or record.key != whole.key():
                whole.run()


@contextmanager
def _placed(order: Order, takes: tuple[str, ...]) -> Iterator[Build]:
    """The build folder as this node sees it, or one of the task's own."""
    build = Build(order.root, takes=takes)
    if order.sent is not None and (
        build.record(DOWNLOAD) != order.sent.record or dangling(build.source)
    ):
        with TemporaryFolder("task") as folder:
            own = Build(folder / "build", order.url, takes)
            order.sent.open_in(own)
            yield own
        return
    if order.sent is None:
        otherwise = "name a URL as --build-dir, with which they need to share nothing"
        check_seen(order.root, build.source, otherwise=otherwise)
    yield build
