"""source/ -> quantized/: one safetensors per source shard, each complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from math import prod
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.checkpoint.atomic import make_folder, write_json
from nf4_pipeline.checkpoint.digest import FileDigest, digest_file, json_sha256
from nf4_pipeline.checkpoint.layout import FileLayout
from nf4_pipeline.checkpoint.shards import tensor_facts
from nf4_pipeline.checkpoint.source import Checkpoint, open_checkpoint
from nf4_pipeline.engine.buffers import divide
from nf4_pipeline.engine.scheduler import QuantizedFile, quantize_files
from nf4_pipeline.engine.tied import TwinsDifferError
from nf4_pipeline.errors import PlanMismatchError, ResourceError
from nf4_pipeline.nf4.packing import blocks_of
from nf4_pipeline.nf4.rounding import NearestOnCpu, Rounding
from nf4_pipeline.progress import Reporter
from nf4_pipeline.resource_usage import available_memory, measured, measured_on_device
from nf4_pipeline.selection import Plan, select
from nf4_pipeline.stages import Settings, calibrate, recorded
from nf4_pipeline.stages.download import recorded_facts

CODE_VERSION: Final = 1
_FACTS_SUFFIX: Final = ".facts.json"
_MANY_PROCESSORS: Final = 8
_BYTES_PER_BLOCK: Final = 24  # absmax, three sums, and the rounded scale twice


def key(build: Build, settings: Settings) -> str:
    """Depends on the weights, the config and the recipe's [quantize]."""
    files = build.need("download").outputs
    shaping = {
        name: digest.sha256
        for name, digest in files.items()
        if name.endswith((".safetensors", ".safetensors.index.json", "/config.json"))
    }
    recipe = settings.recipe.quantize
    parts = {"code": CODE_VERSION, "files": shaping, "recipe": recipe.shaping()}
    if recipe.calibrate:
        parts["calibration"] = calibrate.key_part(build, recipe)
    return json_sha256(parts)


def make_plan(
    build: Build,
    settings: Settings,
    untied: frozenset[str] = frozenset(),
    sensitive: frozenset[str] = frozenset(),
) -> tuple[Plan, Checkpoint]:
    """The plan of a build, from headers and the facts of its model alone.

    Args:
        build: whose download is done.
        settings: the recipe.
        untied: tied tensors that are known to differ from what they are tied to.
        sensitive: modules that stay in 16 bit for what they would lose.

    Raises:
        SourceError: the checkpoint does not fit its config, or nothing in it can be quantized.
    """
    checkpoint = open_checkpoint(build.source)
    facts = recorded_facts(build.need("download"))
    plan = select(
        checkpoint.tensors,
        facts,
        settings.recipe.quantize,
        untied=untied,
        sensitive=sensitive,
    )
    return plan, checkpoint


def run(build: Build, settings: Settings, reporter: Reporter) -> Record:
    """Quantizes a build's checkpoint, shard by shard; shards that are done already stay.

    Raises:
        BuildError: download is not done, or the source changed since.
        SourceError: the checkpoint is not usable.
        ResourceError: the disk is too full.
        PlanMismatchError: the bytes written are not the bytes planned.
    """
    build.check_inputs("download")
    plan, checkpoint = make_plan(build, settings)
    recipe = settings.recipe.quantize
    check_disk(build, plan, choices=bool(recipe.calibrate))
    check_memory(plan, settings.memory_budget)
    with measured() as preparing, measured_on_device() as sampling:
        tokens = calibrate.tokens_for(build, settings, reporter) if recipe.calibrate else None
    stage = key(build, settings)  # tokens are part of it

    def work() -> tuple[dict[str, Any], dict[str, Any]]:
        chosen = None
        if tokens is not None:
            chosen = calibrate.choose(build, plan, tokens, settings, reporter, sampling=sampling)
        # Choices made on another kind of device differ: no file of one stands beside the other's.
        mark = stage if chosen is None else f"{stage}-{chosen.identity}"
        return _planned(build, plan, checkpoint, settings, mark, chosen, reporter)

    table = settings.recipe.table("quantize")
    record = recorded(build, "quantize", stage, work, recipe=table, before=preparing)
    if tokens is not None:
        calibrate.clear(build)
    return record


def _planned(
    build: Build,
    plan: Plan,
    checkpoint: Checkpoint,
    settings: Settings,
    stage: str,
    chosen: calibrate.Calibration | None,
    reporter: Reporter,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Quantizes by the plan, or by another one: layers are kept, or tied tensors differ."""
    sensitive = calibrate.kept_modules(chosen.kept if chosen else ())
    if sensitive:
        plan, _ = make_plan(build, settings, sensitive=sensitive)
    try:
        return _quantize(build, plan, checkpoint, stage, settings, chosen, reporter)
    except TwinsDifferError as error:
        reporter.note(f"{error} Both are kept; starting again.")
    # Rare: config.json says that tensors are tied which the checkpoint stores as different.
    different = frozenset(t.source.name for t in plan.tensors if t.tied_to is not None)
    plan, _ = make_plan(build, settings, different, sensitive)
    return _quantize(build, plan, checkpoint, stage, settings, chosen, reporter)


def _quantize(
    build: Build,
    plan: Plan,
    checkpoint: Checkpoint,
    stage: str,
    settings: Settings,
    chosen: calibrate.Calibration | None,
    reporter: Reporter,
) -> tuple[dict[str, Any], dict[str, Any]]:
    make_folder(build.quantized)
    layouts = plan.layouts()
    _remove_strangers(build, layouts)
    results = {
        file: facts
        for file in layouts
        if (facts := _finished(build.quantized / file, stage, layouts[file])) is not None
    }
    open_layouts = {file: layout for file, layout in layouts.items() if file not in results}

    def done(file: str, found: QuantizedFile) -> None:
        results[file] = _file_facts(build.quantized / file, found, layouts[file], stage)

    rounding = rounding_for(settings.device) if chosen is None else chosen.rounding()
    files = plan.files()
    total = sum(tensor.source.header.nbytes for file in open_layouts for tensor in files[file])
    with reporter.task("quantize", total) as task:
        quantize_files(
            checkpoint,
            plan,
            open_layouts,
            build.quantized,
            done,
            rounding=rounding,
            budget=divide(
                settings.memory_budget,
                settings.workers or rounding.workers,
                rounding.max_chunk_bytes,
            ),
            task=task,
        )
    _warn_of_merged(plan, reporter)
    ordered = {file: results[file] for file in layouts}
    outputs = {
        f"quantized/{file}": FileDigest(found["size"], found["sha256"])
        for file, found in ordered.items()
    }
    facts = _facts(plan, layouts, ordered)
    return outputs, facts if chosen is None else facts | {"calibration": chosen.facts}


def _warn_of_merged(plan: Plan, reporter: Reporter) -> None:
    """Experts that transformers merges on loading stay in 16 bit; nobody should find out late."""
    merged = sum(t.source.header.nbytes for t in plan.by_action("keep") if t.merged)
    total = sum(t.source.header.nbytes for t in plan.tensors)
    if merged:
        reporter.note(
            f"Warning: {merged / total:.0%} of this model ({merged / 1e6:,.1f} MB) stays in "
            "16 bit: transformers merges these weights on loading, which 4-bit weights cannot be."
        )


def rounding_for(device: str) -> Rounding:
    """Where weights are rounded. The bytes are the same anywhere; only the time differs.

    Args:
        device: "cpu", "cuda" or "cuda:N"; "auto" takes GPUs only beside few processors, since many
            are as fast as the disk themselves, and starting CUDA takes longer than they need.
    """
    few = len(os.sched_getaffinity(0)) < _MANY_PROCESSORS
    if device == "cpu" or (device == "auto" and not (few and _may_have_cuda())):
        return NearestOnCpu()
    from nf4_pipeline.runtime.loader import cuda_devices

    devices = cuda_devices(device)
    if not devices:
        return NearestOnCpu()
    from nf4_pipeline.nf4.cuda import NearestOnCuda

    return NearestOnCuda(devices)


def _may_have_cuda() -> bool:
    """False where there can be no CUDA device; known without importing torch."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def check_disk(build: Build, plan: Plan, *, choices: bool = False) -> None:
    """Refuses to begin what the disk cannot hold.

    Args:
        build: where.
        plan: what will be written.
        choices: calibrated codes and scales stand on it, too, until all is written.

    Raises:
        ResourceError: it is too full.
    """
    needed = sum(
        layout.nbytes
        for file, layout in plan.layouts().items()
        if not (build.quantized / file).exists()
    )
    if choices:
        needed += sum(part.nbytes for tensor in plan.quantized for part in tensor.stored)
        needed -= calibrate.chosen_bytes(build)
    free = shutil.disk_usage(build.root).free
    if needed > free:
        raise ResourceError(
            f"{build.root} is on a disk with {free / 1e9:.3f} GB free; the quantized model needs "
            f"{needed / 1e9:.3f} GB. Make space, or name a --build-dir on another disk."
        )


def check_memory(plan: Plan, budget: int) -> None:
    """Refuses to begin what the memory cannot hold: the buffers, and the scales of two weights.

    Raises:
        ResourceError: there is too little.
        UsageError: the budget is.
    """
    divide(budget, 1, 1)  # what is too small is not refused after hours of calibration
    blocks = max(blocks_of(prod(tensor.shape)) for tensor in plan.quantized)
    needed = budget + 2 * blocks * _BYTES_PER_BLOCK
    available = available_memory()
    if available is not None and needed > available:
        raise ResourceError(
            f"Quantizing needs {needed / 1e6:,.0f} MB of memory and {available / 1e6:,.0f} MB are "
            "available. Give it a smaller --memory-budget, or end other programs."
        )


def _remove_strangers(build: Build, layouts: dict[str, FileLayout]) -> None:
    expected = {name for file in layouts for name in (file, file + _FACTS_SUFFIX)}
    for path in build.quantized.iterdir():
        if path.name not in expected:
            path.unlink()


def finished_files(build: Build) -> int:
    """How many quantized files stand whole, of a run that may have ended early."""
    return len(list(build.quantized.glob(f"*{_FACTS_SUFFIX}")))


def _finished(target: Path, stage: str, layout: FileLayout) -> dict[str, Any] | None:
    """The facts of a shard that an earlier run of the same stage finished, or None."""
    try:
        facts: dict[str, Any] = json.loads(
            target.with_name(target.name + _FACTS_SUFFIX).read_text("utf-8")
        )
        same = facts["stage"] == stage and target.stat().st_size == facts["size"] == layout.nbytes
        return facts if same and digest_file(target).sha256 == facts["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _file_facts(
    target: Path, found: QuantizedFile, layout: FileLayout, stage: str
) -> dict[str, Any]:
    """Holds a finished shard against the plan, and leaves its facts beside it."""
    size = target.stat().st_size
    if size != layout.nbytes:
        raise PlanMismatchError(
            f"{target} has {size:,} bytes; the plan said {layout.nbytes:,}. This is a fault of "
            "this program: please report it with the model's name."
        )
    facts = {
        "stage": stage,
        "size": size,
        "sha256": found.written.digest.sha256,
        "tensors": tensor_facts(found.written),
        "relative_rmse": dict(sorted(found.relative_rmse.items())),
    }
    write_json(target.with_name(target.name + _FACTS_SUFFIX), facts)
    return facts


def _facts(
    plan: Plan, layouts: dict[str, FileLayout], results: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    return {
        "predicted_bytes": sum(layout.nbytes for layout in layouts.values()),
        "skip_modules": list(plan.skip_modules),
        "hidden_modules": list(plan.hidden_modules),
        "different_twins": list(plan.untied),
        "files": results,
    }
