"""source/ -> quantized/: one safetensors per source shard, each complete or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import ClassVar, Final

from nf4_pipeline.build_folder import Build, Inputs, Record
from nf4_pipeline.calibration.calibrator import TOKENS_FILE, CalibratedChoice, Calibrator
from nf4_pipeline.checkpoint.atomic import make_folder, write_json
from nf4_pipeline.checkpoint.digest import digest_file, json_sha256
from nf4_pipeline.checkpoint.layout import FileLayout
from nf4_pipeline.checkpoint.plain_file import read_plain
from nf4_pipeline.checkpoint.shards import tensor_facts
from nf4_pipeline.checkpoint.sink import Sink
from nf4_pipeline.checkpoint.writer import writing
from nf4_pipeline.engine.buffers import divide
from nf4_pipeline.engine.quantize_checkpoint import CheckpointPlanner, QuantizationRun
from nf4_pipeline.engine.scheduler import Opener, Output, QuantizedFile
from nf4_pipeline.errors import PlanMismatchError, ResourceError
from nf4_pipeline.machine import Machine
from nf4_pipeline.nf4.packing import blocks_of
from nf4_pipeline.nf4.rounding import Rounding
from nf4_pipeline.progress import SILENT, HighWaterTask, Reporter, Task
from nf4_pipeline.provenance.ci_run import current_run
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import (
    DOWNLOAD,
    QUANTIZE,
    FileFacts,
    QuantizeFacts,
    forget_parts,
    part_records,
    source_files,
)
from nf4_pipeline.resource_usage import Usage, available_memory, measured, measured_on_device
from nf4_pipeline.selection import Plan
from nf4_pipeline.stages.outgoing import STAYS_HERE, Outgoing
from nf4_pipeline.stages.rounding_choice import rounding_for
from nf4_pipeline.stages.run_recorded import Outcome, run_recorded
from nf4_pipeline.stages.streamed_source import StreamedSource, check_streamable, open_source
from nf4_pipeline.streaming.passing import Passing

CODE_VERSION: Final = 2
_LARGEST_FACTS: Final = 256 * 2**20
FACTS_SUFFIX: Final = ".facts.json"
"""What is known of a finished file stands beside it, in one of its name and this."""

_BYTES_PER_BLOCK: Final = 24  # absmax, three sums, and the rounded scale twice


Refuse = Callable[[Collection[str]], None]
"""What is done instead of making files: it raises."""


@dataclass(frozen=True)
class Quantize:
    """Quantizes a build's checkpoint, shard by shard; shards that are done already stay.

    Attributes:
        build: the build folder.
        recipe: what is quantized, and how.
        machine: what the work may use.
        reporter: told how far it is.
        outgoing: what becomes of files that stand whole.
    """

    build: Build
    recipe: Recipe
    machine: Machine
    reporter: Reporter = SILENT
    outgoing: Outgoing = STAYS_HERE

    kind: ClassVar = QUANTIZE

    def key(self) -> str:
        """Depends on the weights, the config and the recipe's [quantize].

        Raises:
            BuildError: download is not done.
            RecipeError: the calibration text cannot be read.
        """
        files = source_files(self.build.need(DOWNLOAD))
        shaping = {
            f"source/{name}": digest.sha256
            for name, digest in files.items()
            if name == "config.json" or name.endswith((".safetensors", ".safetensors.index.json"))
        }
        recipe = self.recipe.quantize
        parts = {"code": CODE_VERSION, "files": shaping, "recipe": recipe.shaping()}
        if recipe.calibrate:
            parts["calibration"] = self._calibrator().key_part()
        return json_sha256(parts)

    def plan(self) -> Plan:
        """What would happen to each tensor, before calibration keeps any for what they lose.

        Raises:
            BuildError: download is not done.
            SourceError: the checkpoint does not fit its config, or nothing in it can be quantized.
        """
        return self.planner().plan()

    def run(
        self, refuse: Refuse | None = None, before: Usage | None = None
    ) -> Record[QuantizeFacts]:
        """Does the work.

        Args:
            refuse: called with the names of files that would have to be made, if there are any, and
                raises; None to make them.
            before: what was spent on files that stand there; None for nothing.

        Raises:
            BuildError: download is not done, or the source changed since, or while it was read; or
                what `refuse` raises.
            SourceError: the checkpoint is not usable.
            ResourceError: the disk is too full, or there is too little memory.
            UsageError: the memory budget is too small for a single worker, or the recipe is a
                calibrated one and the source is streamed.
            HubError: the source is streamed, and the Hub does not give what it lists.
            PlanMismatchError: the bytes written are not the bytes planned.
        """
        source = self.build.check_inputs(DOWNLOAD)
        if self.build.need(DOWNLOAD).facts.streamed:
            check_streamable(self.recipe)
        planner = self.planner()
        untied = self.known_untied() or frozenset()
        plan = planner.plan(untied=untied)
        calibrator = self._calibrator() if self.recipe.quantize.calibrate else None
        self.check_disk(plan, calibrator)
        check_memory(plan, self.machine.memory_budget)
        if calibrator is not None:
            calibrator.check_memory(plan, self.reporter)
        with measured() as preparing, measured_on_device() as sampling:
            tokens = None if calibrator is None else calibrator.tokens(self.reporter)
        if calibrator is not None:  # the key is of them
            self.build.put({f"calibration/{TOKENS_FILE}": digest_file(calibrator.tokens_path)})
        key = self.key()  # tokens are part of it
        spent = preparing if before is None else before

        def work() -> Outcome[QuantizeFacts]:
            choice = None
            if calibrator is not None and tokens is not None:
                choice = calibrator.choose(plan, tokens, self.reporter, sampling=sampling)
            outcome = self._quantize(planner, key, choice, source, untied, refuse)
            source.check_untouched()
            return outcome

        table = self.recipe.table("quantize")
        record = run_recorded(self.build, self.kind, key, work, recipe=table, before=spent)
        if calibrator is not None:
            calibrator.clear()
        forget_parts(self.build)
        return record

    def known_untied(self) -> frozenset[str] | None:
        """Tied tensors that differ, as a part of this very work found out; None without any."""
        parts = part_records(self.build)
        key = self.key() if parts else ""
        own = [record.facts.untied for record in parts.values() if record.key == key]
        return frozenset(name for untied in own for name in untied) if own else None

    def check_disk(
        self,
        plan: Plan,
        calibrator: Calibrator | None = None,
        names: Collection[str] | None = None,
    ) -> None:
        """Refuses to begin what the disk cannot hold.

        Args:
            plan: what will be written.
            calibrator: whose codes and scales stand on the disk, too, until all is written.
            names: of the files that will be written; None for all of the plan.

        Raises:
            ResourceError: the disk has too little free space.
        """
        sizes = {file: layout.nbytes for file, layout in plan.layouts().items()}
        missing = [
            size
            for file, size in sizes.items()
            if (names is None or file in names) and not (self.build.quantized / file).exists()
        ]
        needed = self.outgoing.begin(sizes.values(), missing)
        if calibrator is not None:
            stored = sum(part.nbytes for tensor in plan.quantized for part in tensor.stored)
            needed += stored * (2 if self.recipe.quantize.effort else 1)  # calibrated, and learned
            needed -= calibrator.chosen_bytes()
        free = shutil.disk_usage(self.build.root).free
        if needed > free:
            raise ResourceError(
                f"{self.build.root} is on a disk with {free / 1e9:.3f} GB free; the quantized "
                f"model needs {needed / 1e9:.3f} GB. Make space, or name a --build-dir on another "
                "disk."
            )

    def planner(self) -> CheckpointPlanner:
        """Plans the work.

        Raises:
            BuildError: download is not done.
            SourceError: the checkpoint cannot be read.
        """
        return CheckpointPlanner(
            open_source(self.build),
            self.build.need(DOWNLOAD).facts.model,
            self.recipe.quantize,
        )

    def _calibrator(self) -> Calibrator:
        return Calibrator(
            self.build.source,
            self.build.need(DOWNLOAD).facts.content_sha256,
            self.build.calibration,
            self.recipe.quantize,
            self.machine.device,
        )

    def _quantize(
        self,
        planner: CheckpointPlanner,
        key: str,
        choice: CalibratedChoice | None,
        source: Inputs,
        untied: frozenset[str],
        refuse: Refuse | None,
    ) -> Outcome[QuantizeFacts]:
        if choice is None:
            rounding, kept = self._rounding(planner), frozenset[str]()
        else:
            rounding, kept = choice.rounding(), choice.facts.kept_modules
            # Choices made on another kind of device differ: no file of one beside the other's.
            key = f"{key}-{choice.identity}"

        def work(plan: Plan) -> QuantizeFacts:
            run = QuantizationRun(planner.checkpoint, plan, rounding, self.machine)
            if (streamed := StreamedSource.of(self.build, self.reporter)) is not None:
                streamed.check_tied(plan)  # what an earlier run made by another plan shall stay
            make_folder(self.build.quantized)
            self.outgoing.restart()  # files of another plan may be on their way
            remove_other_files(self.build.quantized, plan.layouts())
            return QuantizeFacts(
                predicted_bytes=sum(layout.nbytes for layout in plan.layouts().values()),
                skip_modules=plan.skip_modules,
                hidden_modules=plan.hidden_modules,
                untied=plan.untied,
                files=self._make_files(run, key, source, refuse=refuse),
                calibration=None if choice is None else choice.facts,
                run=current_run(),
            )

        facts = planner.run(work, self.reporter, kept, untied)
        return {f"quantized/{file}": made.digest for file, made in facts.files.items()}, facts

    def make_files(
        self, plan: Plan, planner: CheckpointPlanner, names: Collection[str], source: Inputs
    ) -> dict[str, FileFacts]:
        """Makes some files of quantized/, rounded to nearest, as far as they do not stand there.

        Args:
            plan: of the whole.
            planner: that made it.
            names: of the files.
            source: as download left it.

        Returns:
            What is known of each of them, by name.

        Raises:
            BuildError: the source was touched while it was read.
            SourceError: a weight holds an infinity or a NaN, or the source cannot be read.
            ResourceError: the disk is too full, or there is too little memory.
            PlanMismatchError: the bytes written are not the bytes planned.
        """
        self.check_disk(plan, names=names)
        check_memory(plan, self.machine.memory_budget)
        rounding = self._rounding(planner)
        run = QuantizationRun(planner.checkpoint, plan, rounding, self.machine)
        make_folder(self.build.quantized)
        return self._make_files(run, self.key(), source, names=names)

    def _rounding(self, planner: CheckpointPlanner) -> Rounding:
        """To nearest, wherever that is faster."""
        return rounding_for(self.machine.device, planner.checkpoint.nbytes, self.reporter)

    def _make_files(
        self,
        run: QuantizationRun,
        key: str,
        source: Inputs,
        *,
        names: Collection[str] | None = None,
        refuse: Refuse | None = None,
    ) -> dict[str, FileFacts]:
        """Makes those files of quantized/ that do not stand there yet; the facts of all of them."""
        folder, plan = self.build.quantized, run.plan
        whole = plan.layouts()
        layouts = whole if names is None else {name: whole[name] for name in names}
        finished = self._find_finished(layouts, key)
        for file, facts in finished.items():
            if (folder / file).exists():
                self.outgoing.reserve(facts.size)
                self.outgoing.add(folder / file, facts.digest)
        if refuse is not None and len(finished) < len(layouts):
            refuse([name for name in layouts if name not in finished])

        def upload(file: str) -> None:
            facts = digest_file(folder / f"{file}{FACTS_SUFFIX}")
            name = f"quantized/{file}"
            put({name: finished[file].digest, f"{name}{FACTS_SUFFIX}": facts})

        def done(file: str, made: QuantizedFile) -> None:
            source.check_untouched()  # else the file would count as finished
            finished[file] = _leave_facts(folder / file, made, layouts[file], key)
            upload(file)
            self.outgoing.add(folder / file, finished[file].digest)

        tensors = plan.files()
        outputs = [Output(f, tensors[f], layouts[f]) for f in layouts if f not in finished]

        def opener(output: Output) -> AbstractContextManager[Sink]:
            return writing(folder / output.name, output.layout)

        streamed = StreamedSource.of(self.build, self.reporter)
        with self.build.uploading(self.reporter) as put:
            for file in finished:
                upload(file)
            if streamed is None:
                run.make("quantize", outputs, opener, done, self.reporter)
            else:
                for output in outputs:  # a file that was made of what nobody has hashed yet
                    (folder / output.name).unlink(missing_ok=True)
                making = _Making(folder, opener, done, self.outgoing, whole=names is None)
                _make_streamed(streamed, run, outputs, making)
        self.outgoing.settle()
        _warn_of_merged(plan, self.reporter)
        return {file: finished[file] for file in layouts}

    def _find_finished(self, layouts: Mapping[str, FileLayout], key: str) -> dict[str, FileFacts]:
        """The facts of files that stand whole; several are hashed at a time."""
        folder = self.build.quantized
        begun = {
            f: layout for f, layout in layouts.items() if (folder / (f + FACTS_SUFFIX)).exists()
        }
        if not begun:
            return {}
        sizes = {f: layout.nbytes if (folder / f).exists() else 0 for f, layout in begun.items()}
        with (
            self.reporter.task("check finished files", sum(sizes.values())) as task,
            ThreadPoolExecutor() as pool,
        ):

            def check(file: str) -> FileFacts | None:
                shown = HighWaterTask(task, sizes[file])
                facts = _finished(self.build, file, key, begun[file], shown)
                shown.advance(sizes[file])  # it may not have been worth a look
                return facts

            found = pool.map(check, begun)
            return {file: facts for file, facts in zip(begun, found, strict=True) if facts}


def _make_streamed(
    streamed: StreamedSource,
    run: QuantizationRun,
    outputs: Sequence[Output],
    making: _Making,
) -> None:
    """Makes files of quantized/ while the source passes by, one file of it after the other.

    What of a file of the source finds no room before its hash is known is made afterwards, of the
    stretches that it needs: these are fetched again, and have hashes by then. A file whose outputs
    all stand is not fetched, if all is known of it that later work needs. Of a part, the others see
    to that.
    """
    of_source: dict[str, list[Output]] = {}
    for output in outputs:
        of_source.setdefault(output.source, []).append(output)
    unknown = {*streamed.missing(run.plan)}
    if not making.whole:
        unknown &= of_source.keys()
    with run.shown("quantize", outputs, streamed.reporter) as task:
        for file in sorted({*of_source, *unknown}):
            left = of_source.get(file, [])
            if file in unknown:
                count = making.outgoing.fitting([output.layout.nbytes for output in left])
                first, left = left[:count], left[count:]
                _make_passing(streamed, run, file, first, making, task)
            for output in left:
                making.outgoing.reserve(output.layout.nbytes)
                streamed.make_again(run, output, making.opener, making.done, task)


def _make_passing(
    streamed: StreamedSource,
    run: QuantizationRun,
    file: str,
    outputs: Sequence[Output],
    making: _Making,
    task: Task,
) -> None:
    """Makes files while a file of the source passes by for the first time.

    It has no hash before its end. Until then they have no facts, and so count no more than if they
    were absent.
    """
    made: dict[str, QuantizedFile] = {}
    begun: list[Output] = []
    shown = HighWaterTask(task)

    def work(passing: Passing) -> None:
        shown.restart()
        drop()
        for output in outputs:
            making.outgoing.reserve(output.layout.nbytes)
            begun.append(output)
            run.make_within(shown, [output], making.opener, made.__setitem__, passing)

    def drop() -> None:
        while begun:
            output = begun.pop()
            (making.folder / output.name).unlink(missing_ok=True)
            making.outgoing.release(output.layout.nbytes)

    try:
        wanted = [tensor.source for output in outputs for tensor in output.tensors]
        streamed.pass_by(file, run.plan, wanted, work)
        if making.whole:
            streamed.check_tied(run.plan)
    except BaseException:
        drop()
        raise
    for output in outputs:
        making.done(output.name, made[output.name])


@dataclass(frozen=True)
class _Making:
    """How files of quantized/ are made.

    Attributes:
        folder: where.
        opener: gives what takes the bytes of a file.
        done: told of each file that counts.
        outgoing: what becomes of it.
        whole: these are all files; of a part, tied tensors may have passed by elsewhere.
    """

    folder: Path
    opener: Opener
    done: Callable[[str, QuantizedFile], None]
    outgoing: Outgoing
    whole: bool


def _warn_of_merged(plan: Plan, reporter: Reporter) -> None:
    """Experts that transformers merges on loading stay in 16 bit; nobody should find out late."""
    merged = sum(t.source.header.nbytes for t in plan.by_action("keep") if t.merged)
    total = sum(t.source.header.nbytes for t in plan.tensors)
    if merged:
        reporter.note(
            f"Warning: {merged / total:.0%} of this model ({merged / 1e6:,.1f} MB) stays in "
            "16 bit: transformers merges these weights on loading, which 4-bit weights cannot be."
        )


def check_memory(plan: Plan, budget: int) -> None:
    """Refuses to begin what the memory cannot hold: the buffers, and the scales of two weights.

    Raises:
        ResourceError: less memory is available than the buffers and the scales need.
        UsageError: the budget is too small for a single worker.
    """
    needed = memory_needed(plan, budget)
    available = available_memory()
    if available is not None and needed > available:
        raise ResourceError(
            f"Quantizing needs {needed / 1e6:,.0f} MB of memory and {available / 1e6:,.0f} MB are "
            "available. Give it a smaller --memory-budget, or end other programs."
        )


def memory_needed(plan: Plan, budget: int) -> int:
    """Bytes of the engine's buffers, and of the scales of two weights.

    Raises:
        UsageError: the budget is too small for a single worker.
    """
    divide(budget, 1, 1)  # what is too small is not refused after hours of calibration
    blocks = max(blocks_of(prod(tensor.shape)) for tensor in plan.quantized)
    return budget + 2 * blocks * _BYTES_PER_BLOCK


def remove_other_files(folder: Path, files: Collection[str]) -> None:
    """Deletes what a run by another plan left."""
    expected = {name for file in files for name in (file, file + FACTS_SUFFIX)}
    for path in folder.iterdir():
        if path.name not in expected:
            path.unlink()


def count_finished_files(build: Build) -> int:
    """How many quantized files stand whole, of a run that may have ended early."""
    return len(list(build.quantized.glob(f"*{FACTS_SUFFIX}")))


def read_facts(target: Path) -> FileFacts | None:
    """What stands beside a file of quantized/; None if nothing does that can be read."""
    try:
        text = read_plain(target.with_name(target.name + FACTS_SUFFIX), _LARGEST_FACTS)
        return FileFacts.from_json(json.loads(text))
    except (OSError, ValueError, RecursionError):
        return None


def _finished(
    build: Build, file: str, key: str, layout: FileLayout, task: Task
) -> FileFacts | None:
    """The facts of a shard that an earlier run with the same key finished, or None.

    A shard that stands at the URL of which the build folder is a copy need not be here.
    """
    target = build.quantized / file
    facts = read_facts(target)
    try:
        if facts is None or facts.key != key or facts.size != layout.nbytes:
            return None
        if target.exists() and digest_file(target, task) == facts.digest:
            return facts
        if not build.holds(f"quantized/{file}", facts.digest):
            return None
        target.unlink(missing_ok=True)
        return facts
    except OSError:
        return None


def _leave_facts(target: Path, made: QuantizedFile, layout: FileLayout, key: str) -> FileFacts:
    """Holds a finished shard against the plan, and leaves its facts beside it."""
    size = target.stat().st_size
    if size != layout.nbytes:
        raise PlanMismatchError(
            f"{target} has {size:,} bytes; the plan said {layout.nbytes:,}. This is a fault of "
            "this program: please report it with the model's name."
        )
    facts = FileFacts(
        key=key,
        size=size,
        sha256=made.written.digest.sha256,
        tensors=tensor_facts(made.written),
        relative_rmse=dict(sorted(made.relative_rmse.items())),
    )
    write_json(target.with_name(target.name + FACTS_SUFFIX), facts.to_json())
    return facts
