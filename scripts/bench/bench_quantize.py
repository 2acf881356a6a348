"""Times stock quantization, this pipeline, and the disk's limit, in turn and in one run.

Each contender runs in a process of its own, so that its peak memory is its own. "stock" is
transformers' from_pretrained with NF4 and double quantization, with the Falcon patch without which
it quantizes nothing, then save_pretrained. "ours" is the stages quantize and serialize, hashes and
double quantization included; "ours-cpu" the same without a GPU. "read" reads the same files side by
side; "limit" does so and meanwhile writes as many bytes as ours, synced; "hash" is the sha256 of
that many bytes, file beside file, each of which is one stream. Times are the work's own; imports
stand beside them. Cold runs need root, since they drop the page cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import click
from kept_ratios import show_beside_kept
from nf4_pipeline.checkpoint.atomic import start_writing_out, write_at
from nf4_pipeline.resource_usage import peak_memory

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_PART = 32 * 2**20
_SIZES = "sizes.json"  # of the output files; in the build folder


@click.group(invoke_without_command=True)
@click.option("--layers", default="2", show_default=True, help="Depths, separated by commas.")
@click.option("--shards", default=2, show_default=True, help="Files of the checkpoint.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--contenders", default="stock,ours,read,limit,hash", show_default=True)
@click.option("--cold/--warm", default=False, help="Drop the page cache before each run.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where checkpoints are made.")
@click.option("--json", "as_json", type=click.Path(path_type=Path), help="Also write all figures.")
@click.pass_context
def main(
    context: click.Context,
    layers: str,
    shards: int,
    rounds: int,
    device: str,
    contenders: str,
    cold: bool,
    folder: Path | None,
    as_json: Path | None,
) -> None:
    """Time falcon-7b-shaped checkpoints of some depths."""
    if context.invoked_subcommand:
        return
    from falcon_shapes import make_checkpoint

    if cold and not os.access(_DROP_CACHES, os.W_OK):
        raise click.ClickException(f"--cold needs to write {_DROP_CACHES}: run it as root.")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="nf4-bench-") as temporary:
        for depth in (int(part) for part in layers.split(",")):
            source = (folder or Path(temporary)) / f"falcon-{depth}-{shards}"
            if not (source / "config.json").exists():
                total = make_checkpoint(source, depth, shards=shards)
                click.echo(f"made {source}: {total / 1e9:.2f} GB", err=True)
            runs = _rounds(source, Path(temporary), contenders.split(","), rounds, device, cold)
            figures[str(depth)] = runs
            _show(depth, cold, runs)
            if folder is None:
                shutil.rmtree(source)
    if as_json:
        as_json.write_text(json.dumps(figures, indent=2))


def _rounds(
    source: Path, work: Path, contenders: list[str], rounds: int, device: str, cold: bool
) -> dict[str, list[dict[str, float]]]:
    build = work / f"build-{source.name}"
    _child("prepare", source, build, device)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in contenders:
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            if cold:
                _DROP_CACHES.write_text("3")
            elif number == 0:
                _child("read", source, out, device)  # fills the page cache
            place = out if name == "stock" else build
            found[name].append(_child(name, source, place, device))
    shutil.rmtree(build)
    return found


def _child(name: str, source: Path, out: Path, device: str) -> dict[str, float]:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "child", name, str(source), str(out), device],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise click.ClickException(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**result, "process": time.perf_counter() - start}


def _show(depth: int, cold: bool, runs: dict[str, list[dict[str, float]]]) -> None:
    click.echo(f"\nfalcon-7b shapes, {depth} layers, {'cold' if cold else 'warm'}")
    click.echo("| | work s | imports s | process s | CPU s | host GB | GPU GB |")
    click.echo("| --- | --- | --- | --- | --- | --- | --- |")
    medians = {name: _medians(values) for name, values in runs.items()}
    for name, m in medians.items():
        spread = [value["work"] for value in runs[name]]
        click.echo(
            f"| {name} | {m['work']:.2f} ({min(spread):.2f}-{max(spread):.2f}) | "
            f"{m['imports']:.2f} | {m['process']:.2f} | {m['cpu']:.2f} | "
            f"{m['host'] / 1e9:.2f} | {m['gpu'] / 1e9:.3f} |"
        )
    for other in ("stock", "read", "limit", "hash"):
        if other in medians and "ours" in medians:
            work = [a["work"] / b["work"] for a, b in zip(runs[other], runs["ours"], strict=True)]
            whole = [
                a["process"] / b["process"] for a, b in zip(runs[other], runs["ours"], strict=True)
            ]
            click.echo(
                f"{other} / ours: work {statistics.median(work):.2f}, "
                f"whole process {statistics.median(whole):.2f}"
            )
            if other == "stock":
                name = f"quantize, {depth} layers: stock / ours"
                show_beside_kept(name, statistics.median(work))


def _medians(values: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(value[key] for value in values) for key in values[0]}


@main.command("child", hidden=True)
@click.argument("name")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("device")
def child(name: str, source: Path, out: Path, device: str) -> None:
    """One contender, once."""
    runners: dict[str, Callable[[Path, Path, str], dict[str, float]]] = {
        "prepare": _prepare,
        "stock": _stock,
        "ours": _ours,
        "ours-cpu": _ours_cpu,
        "read": _read,
        "limit": _limit,
        "hash": _hash,
    }
    result = runners[name](source, out, device)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result["cpu"] = usage.ru_utime + usage.ru_stime
    result["host"] = peak_memory()  # ru_maxrss would count what the parent held when it forked
    click.echo(json.dumps(result))


def _prepare(source: Path, out: Path, device: str) -> dict[str, float]:
    from nf4_pipeline.build_folder import Build
    from nf4_pipeline.machine import Machine
    from nf4_pipeline.progress import SILENT
    from nf4_pipeline.recipe import Recipe
    from nf4_pipeline.stages.download import Download
    from nf4_pipeline.stages.download_request import DownloadRequest
    from nf4_pipeline.stages.quantize import Quantize

    Download(DownloadRequest(str(source), build_dir=out), SILENT).run()
    plan = Quantize(Build(out), Recipe(), Machine()).plan()
    sizes = {file: layout.nbytes for file, layout in plan.layouts().items()}
    (out / _SIZES).write_text(json.dumps(sizes))
    return _took(0.0)


def _ours(source: Path, out: Path, device: str) -> dict[str, float]:
    start = time.perf_counter()
    import numpy as np
    from nf4_pipeline.build_folder import Build
    from nf4_pipeline.machine import Machine
    from nf4_pipeline.recipe import Recipe
    from nf4_pipeline.records import QUANTIZE, SERIALIZE
    from nf4_pipeline.stages.quantize import Quantize
    from nf4_pipeline.stages.rounding_choice import rounding_for
    from nf4_pipeline.stages.serialize import Serialize

    build = Build(out)
    for kind in (QUANTIZE, SERIALIZE):
        build.forget(kind)
    for folder in (build.quantized, build.export):
        shutil.rmtree(folder, ignore_errors=True)
    # Loads the kernels (and CUDA, if it is used) as importing would.
    rounding = rounding_for(device, sum(path.stat().st_size for path in _weight_files(source)))
    bits, packed = np.ones(64, np.uint16), np.zeros(32, np.uint8)
    rounding.start_weight("warm", 64).quantize_chunk(bits, "bfloat16", 0, packed)
    imported = time.perf_counter()
    Quantize(build, Recipe(), Machine(device=device)).run()
    quantized = time.perf_counter()
    Serialize(build, Recipe()).run()
    end = time.perf_counter()
    return {
        "work": end - imported,
        "quantize": quantized - imported,
        "imports": imported - start,
        "gpu": _gpu_peak(),
    }


def _ours_cpu(source: Path, out: Path, device: str) -> dict[str, float]:
    return _ours(source, out, "cpu")


def _stock(source: Path, out: Path, device: str) -> dict[str, float]:
    start = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.models.falcon import modeling_falcon

    modeling_falcon.FalconLinear = torch.nn.Linear
    place = "cuda:0" if device != "cpu" and torch.cuda.is_available() else "cpu"
    torch.zeros(1, device=place)
    imported = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype="auto",
        device_map={"": place},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    model.save_pretrained(out)
    return {
        "work": time.perf_counter() - imported,
        "imports": imported - start,
        "gpu": _gpu_peak(),
    }


def _gpu_peak() -> float:
    if "torch" not in sys.modules:
        return 0.0
    import torch

    return float(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0.0


def _took(seconds: float) -> dict[str, float]:
    return {"work": seconds, "imports": 0.0, "gpu": 0.0}


def _read(source: Path, out: Path, device: str) -> dict[str, float]:
    """Reads all weight files side by side, eight parts at a time."""
    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_read_part, _parts(source)))
    return _took(time.perf_counter() - start)


def _limit(source: Path, out: Path, device: str) -> dict[str, float]:
    """Reads as `_read` does, and writes what ours would have written by then; synced at the end."""
    total = sum(path.stat().st_size for path in _weight_files(source))
    share = sum(json.loads((out / _SIZES).read_text()).values()) / total
    content = memoryview(os.urandom(int(_PART * share) // 4096 * 4096))
    parts = _parts(source)
    target = out / "limit"
    start = time.perf_counter()
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.ftruncate(descriptor, len(parts) * len(content))

    def both(numbered: tuple[int, tuple[Path, int]]) -> None:
        number, part = numbered
        _read_part(part)
        offset = number * len(content)
        write_at(descriptor, content, offset)
        written_out.submit(start_writing_out, descriptor, offset, len(content))

    with ThreadPoolExecutor(1) as written_out, ThreadPoolExecutor(8) as pool:
        list(pool.map(both, enumerate(parts)))
    os.fsync(descriptor)
    os.close(descriptor)
    took = time.perf_counter() - start
    target.unlink()
    return _took(took)


def _hash(source: Path, out: Path, device: str) -> dict[str, float]:
    """The sha256 of as many bytes as each output file has, from memory."""
    sizes = json.loads((out / _SIZES).read_text()).values()
    content = os.urandom(_PART)

    def one(size: int) -> None:
        digest = hashlib.sha256()
        for offset in range(0, size, _PART):
            digest.update(memoryview(content)[: size - offset])

    start = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        list(pool.map(one, sizes))
    return _took(time.perf_counter() - start)


def _weight_files(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors"))


def _parts(source: Path) -> list[tuple[Path, int]]:
    """All weight files in parts, a part of each file in turn."""
    files = [
        [(path, offset) for offset in range(0, path.stat().st_size, _PART)]
        for path in _weight_files(source)
    ]
    return [part for turn in zip_longest(*files) for part in turn if part is not None]


def _read_part(part: tuple[Path, int]) -> None:
    path, offset = part
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        left = _PART
        buffer = bytearray(4 * 2**20)
        while left and (count := file.readinto(memoryview(buffer)[: min(left, len(buffer))])):
            left -= count


if __name__ == "__main__":
    main()
