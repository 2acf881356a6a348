"""source/ -> quantized/: one safetensors per source shard, each complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

from pipeline.build import Build, Record, stage_key
from pipeline.checkpoint.digest import FileDigest, digest_file, tensors_equal
from pipeline.checkpoint.durable import remove_leftovers, write_json
from pipeline.checkpoint.layout import FileLayout
from pipeline.checkpoint.shards import tensor_facts
from pipeline.checkpoint.source import Checkpoint, open_checkpoint
from pipeline.engine.quantize import QuantizedFile, quantize_file
from pipeline.errors import PlanMismatchError, ResourceError
from pipeline.model.config import read_config
from pipeline.model.skeleton import model_facts
from pipeline.nf4.rounding import NearestOnCpu
from pipeline.progress import Reporter
from pipeline.selection import Plan, select
from pipeline.stages import Settings, recorded

CODE_VERSION: Final = 1
_FACTS_SUFFIX: Final = ".facts.json"


def key(build: Build, settings: Settings) -> str:
    """Depends on the weights, the config and the recipe's [quantize]."""
    files = build.need("download").outputs
    shaping = {
        name: digest.sha256
        for name, digest in files.items()
        if name.endswith((".safetensors", ".safetensors.index.json", "/config.json"))
    }
    recipe = settings.recipe.as_json()["quantize"]
    return stage_key({"code": CODE_VERSION, "files": shaping, "recipe": recipe})


def make_plan(build: Build, settings: Settings) -> tuple[Plan, Checkpoint, str]:
    """The plan of a build, with tied twins compared; also the checkpoint and the model class.

    Raises:
        SourceError: the checkpoint does not fit its config, or nothing in it can be quantized.
    """
    checkpoint = open_checkpoint(build.source)
    config = read_config(build.source)
    facts = model_facts(config, [tensor.name for tensor in checkpoint.tensors], build.source)
    plan = select(checkpoint.tensors, facts, settings.recipe.quantize)
    different = _different_twins(plan, checkpoint)
    if different:
        plan = select(
            checkpoint.tensors, facts, settings.recipe.quantize, different_twins=different
        )
    return plan, checkpoint, facts.class_name


def run(build: Build, settings: Settings, reporter: Reporter) -> Record:
    """Quantizes a build's checkpoint, shard by shard; shards that are done already stay.

    Raises:
        SourceError: the checkpoint is not usable.
        ResourceError: the disk is too full.
        PlanMismatchError: the bytes written are not the bytes planned.
    """
    stage = key(build, settings)
    plan, checkpoint, model_class = make_plan(build, settings)
    layouts = plan.layouts()
    _check_disk(build, layouts)

    def work() -> tuple[dict[str, Any], dict[str, Any]]:
        build.quantized.mkdir(parents=True, exist_ok=True)
        remove_leftovers(build.quantized)
        _remove_strangers(build, layouts)
        results = _quantize_all(build, plan, checkpoint, layouts, stage, settings, reporter)
        return _outputs(results), _facts(plan, layouts, results, model_class)

    return recorded(build, "quantize", stage, work)


def _quantize_all(
    build: Build,
    plan: Plan,
    checkpoint: Checkpoint,
    layouts: dict[str, FileLayout],
    stage: str,
    settings: Settings,
    reporter: Reporter,
) -> dict[str, dict[str, Any]]:
    files = plan.files()
    total = sum(tensor.source.header.nbytes for tensors in files.values() for tensor in tensors)
    results: dict[str, dict[str, Any]] = {}
    with reporter.task("quantize", total) as task:
        for file, tensors in files.items():
            target = build.quantized / file
            found = _finished(target, stage)
            if found is not None:
                task.advance(sum(tensor.source.header.nbytes for tensor in tensors))
            else:
                written = quantize_file(
                    checkpoint.path(file),
                    target,
                    tensors,
                    layouts[file],
                    rounding=NearestOnCpu(),
                    workers=settings.workers or _default_workers(),
                    task=task,
                )
                _check_bytes(target, layouts[file], written)
                found = _file_facts(written, stage)
                write_json(target.with_name(target.name + _FACTS_SUFFIX), found)
            results[file] = found
    return results


def _default_workers() -> int:
    """One more than the processors, so that one can wait for the disk."""
    return len(os.sched_getaffinity(0)) + 1


def _different_twins(plan: Plan, checkpoint: Checkpoint) -> frozenset[str]:
    by_name = {tensor.name: tensor for tensor in checkpoint.tensors}
    different = set()
    for tensor in plan.by_action("drop"):
        if tensor.twin is not None:
            twin = by_name[tensor.twin]
            if not tensors_equal(
                (checkpoint.path(tensor.source.file), tensor.source.header),
                (checkpoint.path(twin.file), twin.header),
            ):
                different.add(tensor.source.name)
    return frozenset(different)


def _check_disk(build: Build, layouts: dict[str, FileLayout]) -> None:
    needed = sum(
        layout.max_bytes
        for file, layout in layouts.items()
        if not (build.quantized / file).exists()
    )
    free = shutil.disk_usage(build.root).free
    if needed > free:
        raise ResourceError(
            f"{build.root} is on a disk with {free / 1e9:.1f} GB free; the quantized model needs "
            f"{needed / 1e9:.1f} GB. Make space, or name a --build-dir on another disk."
        )


def _remove_strangers(build: Build, layouts: dict[str, FileLayout]) -> None:
    expected = {name for file in layouts for name in (file, file + _FACTS_SUFFIX)}
    for path in build.quantized.iterdir():
        if path.name not in expected:
            path.unlink()


def _finished(target: Path, stage: str) -> dict[str, Any] | None:
    """The facts of a shard that an earlier run of the same stage finished, or None."""
    try:
        facts: dict[str, Any] = json.loads(
            target.with_name(target.name + _FACTS_SUFFIX).read_text("utf-8")
        )
        same = facts["stage"] == stage and target.stat().st_size == facts["size"]
        return facts if same and digest_file(target).sha256 == facts["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_bytes(target: Path, layout: FileLayout, written: QuantizedFile) -> None:
    most, least = layout.max_bytes, layout.max_bytes - layout.slack_bytes
    if not least <= written.digest.size <= most:
        raise PlanMismatchError(
            f"{target} has {written.digest.size:,} bytes; the plan said {least:,} to {most:,}. "
            "This is a fault of this program: please report it with the model's name."
        )


def _file_facts(written: QuantizedFile, stage: str) -> dict[str, Any]:
    return {
        "stage": stage,
        "size": written.digest.size,
        "sha256": written.digest.sha256,
        "tensors": tensor_facts(written.tensors, written.sha256),
        "relative_rmse": dict(sorted(written.relative_rmse.items())),
    }


def _outputs(results: dict[str, dict[str, Any]]) -> dict[str, FileDigest]:
    return {
        f"quantized/{file}": FileDigest(found["size"], found["sha256"])
        for file, found in results.items()
    }


def _facts(
    plan: Plan,
    layouts: dict[str, FileLayout],
    results: dict[str, dict[str, Any]],
    model_class: str,
) -> dict[str, Any]:
    return {
        "model_class": model_class,
        "predicted_bytes": sum(layout.max_bytes for layout in layouts.values()),
        "prediction_slack": sum(layout.slack_bytes for layout in layouts.values()),
        "skip_modules": list(plan.skip_modules),
        "hidden_modules": list(plan.hidden_modules),
        "different_twins": [t.source.name for t in plan.tensors if t.twin and t.action == "keep"],
        "files": results,
    }
