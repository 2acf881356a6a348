"""quantized/ -> export/: the artifact and its manifest. Weights are linked where possible."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.build_folder import Build, Record, stage_key
from nf4_pipeline.checkpoint.atomic import (
    json_bytes,
    link_or_copy,
    replacing_folder,
    write_bytes,
)
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.checkpoint.shards import Shard, name_shards, split_file, write_shard
from nf4_pipeline.checkpoint.weight_files import INDEX_FILE
from nf4_pipeline.errors import BuildError, ResourceError
from nf4_pipeline.manifest.assemble import build_manifest, shown
from nf4_pipeline.manifest.read import MANIFEST_FILE
from nf4_pipeline.manifest.small_files import small_files, stored_tensors_of, weight_index
from nf4_pipeline.model.unused_tensors import left_out
from nf4_pipeline.progress import Reporter
from nf4_pipeline.selection import Plan
from nf4_pipeline.stages import Settings, calibrate, quantize, recorded
from nf4_pipeline.stages.calibrate import CALIBRATION_FILE
from nf4_pipeline.stages.download import recorded_facts, recorded_files

CODE_VERSION: Final = 1


def key(build: Build, settings: Settings) -> str:
    """Depends on what quantize wrote, on the small files of the source, and on [serialize]."""
    download, quantized = build.need("download"), build.need("quantize")
    calibration = quantized.facts.get("calibration")
    small = {
        name: digest.sha256
        for name, digest in recorded_files(download).items()
        if not name.endswith(".safetensors")
    }
    return stage_key(
        {
            "code": CODE_VERSION,
            "quantized": {name: digest.sha256 for name, digest in quantized.outputs.items()},
            "small": small,
            "recipe": settings.recipe.as_json()["serialize"],
            "quantize_recipe": settings.recipe.as_json()["quantize"],
            **({"calibration": shown(calibration)} if calibration else {}),
        }
    )


def run(build: Build, settings: Settings, reporter: Reporter) -> Record:
    """Writes the export folder.

    Raises:
        BuildError: quantize is not done, or was done with another recipe.
        ResourceError: the disk is too full.
    """
    record = build.need("quantize")
    if record.key != quantize.key(build, settings):
        raise BuildError(
            f"{build.root}: what `quantize` wrote is stale (its source or its recipe changed). "
            "Run `nf4 quantize` again, or `nf4 build`."
        )
    build.check_inputs("quantize")
    calibration = record.facts.get("calibration")
    plan, _ = quantize.make_plan(
        build,
        settings,
        frozenset(record.facts["different_twins"]),
        calibrate.kept_modules(calibration["kept"] if calibration else ()),
    )
    model_class = recorded_facts(build.need("download")).class_name

    def work() -> tuple[dict[str, Any], dict[str, Any]]:
        with replacing_folder(build.export) as folder:
            shards = _weights(build, record, settings, folder, reporter)
            files = {shard.name: shard.digest for shard in shards}
            names = recorded_files(build.need("download"))
            small = small_files(build.source, names, plan, model_class)
            if len(shards) > 1:
                small[INDEX_FILE] = json_bytes(weight_index(shards))
            if calibration:
                small[CALIBRATION_FILE] = calibrate.published(build, calibration)
            files |= {name: FileDigest.of(content) for name, content in small.items()}
            manifest = _manifest(build, settings, plan, model_class, record, shards, files)
            small[MANIFEST_FILE] = json_bytes(manifest)
            files[MANIFEST_FILE] = FileDigest.of(small[MANIFEST_FILE])
            for name, content in small.items():
                write_bytes(folder / name, content)
            # The earlier export goes now, and with it what was measured of it.
            build.forget("attest")
            build.forget("verify")
        outputs = {f"export/{name}": digest for name, digest in files.items()}
        return outputs, {
            "totals": manifest["totals"],
            "hidden_modules": list(plan.hidden_modules),
            "left_out": left_out(
                (tensor.reason, tensor.source.header.nbytes) for tensor in plan.by_action("drop")
            ),
        }

    table = settings.recipe.table("serialize")
    return recorded(build, "serialize", key(build, settings), work, recipe=table)


def _weights(
    build: Build, record: Record, settings: Settings, folder: Path, reporter: Reporter
) -> list[Shard]:
    """The weight files: each quantized file as it is, or cut where it is too large."""
    limit = settings.recipe.serialize.max_shard_bytes
    pieces = [
        piece
        for file in record.facts["files"]
        for piece in split_file(build.quantized / file, limit)
    ]
    names = name_shards(len(pieces))
    shards = []
    total = sum(piece.nbytes for piece in pieces if not piece.whole)
    _check_disk(build, total)
    with reporter.task("reshard", total) as task:
        for name, piece in zip(names, pieces, strict=True):
            target = folder / name
            if piece.whole:
                link_or_copy(piece.path, target)
                found = record.facts["files"][piece.path.name]
                shards.append(
                    Shard(name, FileDigest(found["size"], found["sha256"]), found["tensors"])
                )
            else:
                shards.append(write_shard(target, piece, task))
    return shards


def _check_disk(build: Build, needed: int) -> None:
    free = shutil.disk_usage(build.root).free
    if needed > free:
        raise ResourceError(
            f"{build.root} is on a disk with {free / 1e9:.3f} GB free; cutting the weights into "
            f"shards needs {needed / 1e9:.3f} GB. Make space, or leave --max-shard-size out."
        )


def _manifest(
    build: Build,
    settings: Settings,
    plan: Plan,
    model_class: str,
    quantized: Record,
    shards: list[Shard],
    files: Mapping[str, FileDigest],
) -> dict[str, Any]:
    download = build.need("download")
    errors = {
        name: value
        for found in quantized.facts["files"].values()
        for name, value in found["relative_rmse"].items()
    }
    return build_manifest(
        source={name: download.facts[name] for name in ("repo", "commit", "content_sha256")},
        source_files=recorded_files(download),
        recipe=settings.recipe,
        plan=plan,
        stored=stored_tensors_of(shards),
        relative_rmse=errors,
        files=files,
        model_class=model_class,
        calibration=quantized.facts.get("calibration"),
    )
