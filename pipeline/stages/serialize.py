"""quantized/ -> export/: the artifact and its manifest. Weights are linked where possible."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pipeline.build import Build, Record, stage_key
from pipeline.checkpoint.digest import FileDigest, digest_file
from pipeline.checkpoint.durable import json_bytes, link_or_copy, write_bytes, write_json
from pipeline.checkpoint.files import travels
from pipeline.checkpoint.shards import Shard, name_shards, split_file, write_shard
from pipeline.checkpoint.source import INDEX_FILE
from pipeline.errors import BuildError
from pipeline.manifest.build import build_manifest
from pipeline.manifest.read import MANIFEST_FILE
from pipeline.model.config import CONFIG_FILE, read_config, without_remote_code
from pipeline.progress import Reporter
from pipeline.selection import FLOAT_DTYPES, Plan
from pipeline.stages import Settings, quantize, recorded
from pipeline.stages.download import recorded_facts, recorded_files

CODE_VERSION: Final = 1


def key(build: Build, settings: Settings) -> str:
    """Depends on what quantize wrote, on the small files of the source, and on [serialize]."""
    download, quantized = build.need("download"), build.need("quantize")
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
        }
    )


def run(build: Build, settings: Settings, reporter: Reporter) -> Record:
    """Writes the export folder.

    Raises:
        BuildError: quantize is not done, or was done with another recipe.
    """
    record = build.need("quantize")
    if record.key != quantize.key(build, settings):
        raise BuildError(
            f"{build.root}: what `quantize` wrote is stale (its source or its recipe changed). "
            "Run `nf4 quantize` again, or `nf4 build`."
        )
    build.check_inputs("quantize")
    plan, _ = quantize.make_plan(build, settings, frozenset(record.facts["different_twins"]))
    model_class = recorded_facts(build.need("download")).class_name

    def work() -> tuple[dict[str, Any], dict[str, Any]]:
        _clear(build)
        shards = _weights(build, record, settings, reporter)
        files = {shard.name: shard.digest for shard in shards}
        files |= _small_files(build, plan, model_class)
        if len(shards) > 1:
            write_json(build.export / INDEX_FILE, _index(shards))
            files[INDEX_FILE] = digest_file(build.export / INDEX_FILE)
        manifest = _manifest(build, settings, plan, model_class, record, shards, files)
        write_json(build.export / MANIFEST_FILE, manifest)
        files[MANIFEST_FILE] = digest_file(build.export / MANIFEST_FILE)
        outputs = {f"export/{name}": digest for name, digest in files.items()}
        return outputs, {"totals": manifest["totals"], "hidden_modules": list(plan.hidden_modules)}

    return recorded(build, "serialize", key(build, settings), work)


def _clear(build: Build) -> None:
    """An export is made anew: what an earlier one left must not be published with it."""
    build.forget("verify")
    if build.export.exists():
        shutil.rmtree(build.export)
    build.export.mkdir(parents=True)


def _weights(build: Build, record: Record, settings: Settings, reporter: Reporter) -> list[Shard]:
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
    with reporter.task("reshard", total) as task:
        for name, piece in zip(names, pieces, strict=True):
            target = build.export / name
            if piece.whole:
                link_or_copy(piece.path, target)
                found = record.facts["files"][piece.path.name]
                shards.append(
                    Shard(name, FileDigest(found["size"], found["sha256"]), found["tensors"])
                )
            else:
                shards.append(write_shard(target, piece, task))
    return shards


def _small_files(build: Build, plan: Plan, model_class: str) -> dict[str, FileDigest]:
    """config.json with its quantization config, and the files that travel as they are."""
    config = without_remote_code(read_config(build.source))
    config["architectures"] = [model_class]
    dtype = str(config.get("dtype") or config.get("torch_dtype"))
    if dtype not in FLOAT_DTYPES.values():
        stored = Counter(tensor.source.header.dtype for tensor in plan.quantized)
        dtype = FLOAT_DTYPES[stored.most_common(1)[0][0]]
        config["torch_dtype"] = dtype
    config["quantization_config"] = quantization_config(dtype, plan.skip_modules)
    written = {CONFIG_FILE: json_bytes(config)}
    for name in recorded_files(build.need("download")):
        if travels(name):
            written[name] = _without_remote_tokenizer(name, build.source / name)
    for name, content in written.items():
        write_bytes(build.export / name, content)
    return {name: digest_file(build.export / name) for name in sorted(written)}


def _without_remote_tokenizer(name: str, path: Path) -> bytes:
    """A tokenizer config may point at code that does not come along; everything else is exact."""
    content = path.read_bytes()
    if name != "tokenizer_config.json" or b'"auto_map"' not in content:
        return content
    return json_bytes(without_remote_code(json.loads(content)))


def quantization_config(dtype: str, skip_modules: tuple[str, ...]) -> dict[str, Any]:
    """What config.json tells transformers: the values of a `BitsAndBytesConfig`.

    Args:
        dtype: in which 4-bit layers compute, such as "bfloat16".
        skip_modules: modules that are not 4 bit.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip_modules),
        "llm_int8_threshold": 6.0,
    }


def _index(shards: list[Shard]) -> dict[str, Any]:
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    total = sum(part["bytes"] for shard in shards for part in shard.tensors.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


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
        stored={
            name: {"file": shard.name, **part}
            for shard in shards
            for name, part in shard.tensors.items()
        },
        relative_rmse=errors,
        files=files,
        model_class=model_class,
    )
