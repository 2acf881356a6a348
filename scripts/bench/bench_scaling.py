"""Times `nf4 quantize --part` in several processes at once, beside the disk's limit and the model.

    python scripts/bench/bench_scaling.py --workers 1,2,4 [--cold]
    python scripts/bench/bench_scaling.py --workers 1,2 --device cuda     # a GPU for each worker
    python scripts/bench/bench_scaling.py --workers 1,2 --folder /dev/shm # without any disk
    python scripts/bench/bench_scaling.py --extrapolate                   # no run: known models

A worker is a process that makes its share of the output files, pinned to processors of its own (of
N workers at most, to 1/N of the host), so that one of them stands for a host or for a GPU with its
processors. "work" is the time from the first worker's first byte to the last one's last, "whole"
that from the start of the processes, imports included. "rounding" is what all workers at once round
in a second, each on its device with its processors, of a chunk that is in memory: copied there,
rounded, copied back, and neither read, hashed nor written. "limit" reads the same files and writes
as many bytes, synced, and does nothing else. "model" is `stages/cost_model.py` with the rates that
one worker had and the disk's of the limit. Cold runs need root.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.atomic import write_at
from nf4_pipeline.engine.parts import Part
from nf4_pipeline.machine import Machine
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.stages.cost_model import (
    Hosts,
    Rates,
    Work,
    download_seconds,
    merge_seconds,
    quantize_seconds,
)
from nf4_pipeline.stages.quantize import Quantize

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_CHUNK = 16 * 2**20
_EFFICIENCY = 0.65  # of the processors' rates; docs/scaling.md says where it is from
_BITS = 4.127  # of a quantized weight, with its scales


@dataclass(frozen=True)
class Run:
    """What some workers took: seconds, and those of all their processors together.

    Attributes:
        work: seconds from the first byte to the last.
        whole: seconds of the processes.
        processors: seconds of all their processors together.
        rates: of each worker, while the others were measured, too.
    """

    work: float
    whole: float
    processors: float
    rates: list[Rates]

    @property
    def weights(self) -> int:
        """Rounded in a second by all workers together."""
        return sum(rates.weights for rates in self.rates)


@click.command()
@click.option("--workers", default="1,2", show_default=True, help="Counts, separated by commas.")
@click.option("--device", default="cpu", show_default=True, help='"cuda": a GPU for each worker.')
@click.option("--layers", default=6, show_default=True, help="Of falcon-7b's shapes.")
@click.option("--shards", default=24, show_default=True, help="Files of the checkpoint.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--cold/--warm", default=False, help="Drop the page cache before each run.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where all files are made.")
@click.option("--extrapolate", is_flag=True, help="Only say what the model says of known models.")
@click.option("--part", hidden=True, help="Of a worker: which it makes.")
def main(
    workers: str,
    device: str,
    layers: int,
    shards: int,
    rounds: int,
    cold: bool,
    folder: Path | None,
    extrapolate: bool,
    part: str | None,
) -> None:
    """Time one checkpoint with several numbers of workers."""
    if extrapolate:
        _extrapolate()
        return
    if part is not None:
        assert folder is not None
        _make_part(folder, part, device)
        return
    if cold and not os.access(_DROP_CACHES, os.W_OK):
        raise click.ClickException(f"--cold needs to write {_DROP_CACHES}: run it as root.")
    counts = [int(count) for count in workers.split(",")]
    with tempfile.TemporaryDirectory(prefix="nf4-scaling-", dir=folder) as temporary:
        _compare(Path(temporary), counts, device, layers, shards, rounds, cold)


def _compare(
    folder: Path, counts: list[int], device: str, layers: int, shards: int, rounds: int, cold: bool
) -> None:
    build, work = _prepare(folder, layers, shards)
    own = max(1, (os.cpu_count() or 1) // max(counts))
    runs: dict[int, list[Run]] = {count: [] for count in counts}
    limits: list[tuple[float, float]] = []
    _limit(folder, build, cold)  # fills the page cache
    for _ in range(rounds):
        for count in counts:
            runs[count].append(_run(build, count, own, device, cold))
        limits.append(_limit(folder, build, cold))
    reading, writing = (statistics.median(values) for values in zip(*limits, strict=True))
    rates = [run.rates[0] for run in runs[counts[0]]]
    rate = Rates(
        sha256=int(statistics.median(each.sha256 for each in rates)),
        weights=int(statistics.median(each.weights for each in rates)),
    )
    click.echo(
        f"{work.files} files, {work.source_bytes / 1e9:.2f} GB in, {work.output_bytes / 1e9:.2f} "
        f"GB out, {'cold' if cold else 'warm'}, {device}, {own} processors a worker: "
        f"{rate.weights / 1e9:.2f} G weights/s, {rate.sha256 / 1e9:.2f} GB/s of sha256"
    )
    click.echo(
        f"limit: reading {reading:.1f} s, writing {writing:.1f} s, synced "
        f"({work.source_bytes / 1e9 / reading:.2f} and "
        f"{work.output_bytes / 1e9 / writing:.2f} GB/s)"
    )
    click.echo(
        "| workers | work s | GB/s in | speedup | efficiency | rounding G weights/s "
        "| efficiency of rounding | model s | CPU s |"
    )
    click.echo("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    base = statistics.median(run.work for run in runs[counts[0]]) * counts[0]
    alone = statistics.median(run.weights for run in runs[counts[0]]) / counts[0]
    for count in counts:
        took = [run.work for run in runs[count]]
        median = statistics.median(took)
        used = statistics.median(run.processors for run in runs[count])
        hosts = Hosts(
            rates=rate,
            processors=own,
            count=min(count, max(1, (os.cpu_count() or 1) // own)),
            disk_read=work.source_bytes / reading,
            disk_write=work.output_bytes / writing,
            efficiency=_EFFICIENCY,
        )
        foretold = quantize_seconds(work, hosts)
        weights = statistics.median(run.weights for run in runs[count])
        click.echo(
            f"| {count} | {median:.1f} ({min(took):.1f}-{max(took):.1f}) | "
            f"{work.source_bytes / 1e9 / median:.2f} | {base / median:.2f} | "
            f"{base / median / count:.2f} | {weights / 1e9:.2f} | "
            f"{weights / alone / count:.2f} | {foretold:.1f} | {used:.1f} |"
        )
    whole = ", ".join(
        f"{count}: {statistics.median(run.whole for run in runs[count]):.1f} s" for count in counts
    )
    click.echo(f"whole processes, by workers: {whole}")


def _prepare(folder: Path, layers: int, shards: int) -> tuple[Build, Work]:
    from falcon_shapes import make_checkpoint
    from nf4_pipeline.stages.download import Download
    from nf4_pipeline.stages.download_request import DownloadRequest

    source = folder / "model"
    make_checkpoint(source, layers, shards=shards)
    build = Download(DownloadRequest(str(source), build_dir=folder / "build"), SILENT).run().build
    plan = Quantize(build, Recipe(), Machine(device="cpu")).plan()
    sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
    layouts = plan.layouts()
    work = Work(
        source_bytes=sum(sizes),
        largest_source=max(sizes),
        weights=sum(tensor.source.header.nbytes // 2 for tensor in plan.quantized),
        output_bytes=sum(layout.nbytes for layout in layouts.values()),
        files=len(layouts),
    )
    return build, work


def _run(build: Build, count: int, own: int, device: str, cold: bool) -> Run:
    """Makes all files with some workers at once."""
    shutil.rmtree(build.quantized, ignore_errors=True)
    for left in (build.root / "records").glob("quantize*"):
        left.unlink()
    _settle(cold)
    processors = sorted(os.sched_getaffinity(0))
    begin = time.time()
    running = []
    for number in range(count):
        first = number * own % len(processors)
        mine = ",".join(map(str, processors[first : first + own]))
        environment = {**os.environ, "NF4_PROCESSORS": mine}
        if device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = str(number)
        command = [sys.executable, __file__, "--folder", str(build.root), "--device", device]
        running.append(
            subprocess.Popen(
                [*command, "--part", f"{number + 1}/{count}"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    _together(running)
    rates = _together(running)
    said = [worker.communicate()[0] for worker in running]
    if any(worker.returncode for worker in running):
        raise click.ClickException("a worker failed")
    begun, ended, used = zip(*map(json.loads, said), strict=True)
    return Run(
        max(ended) - min(begun),
        time.time() - begin,
        sum(used),
        [Rates.from_json(json.loads(line)) for line in rates],
    )


def _together(running: list[subprocess.Popen[str]]) -> list[str]:
    """Waits for a line of each worker; has all of them go on at once. Returns the lines."""
    lines = []
    for worker in running:
        assert worker.stdout is not None
        lines.append(worker.stdout.readline())
        if not lines[-1]:
            raise click.ClickException("a worker failed")
    for worker in running:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    return lines


def _make_part(folder: Path, part: str, device: str) -> None:
    """A worker: says that it is ready, its rates, and when it began and ended.

    Before each of the two, it waits for the others.
    """
    os.sched_setaffinity(0, {int(number) for number in os.environ["NF4_PROCESSORS"].split(",")})
    from nf4_pipeline.stages.forecast import measure_rates
    from nf4_pipeline.stages.quantize_parts import QuantizePart
    from nf4_pipeline.stages.rounding_choice import rounding_for

    stage = Quantize(Build(folder), Recipe(), Machine(device=device), SILENT)
    rounding = rounding_for(device, 0)
    measure_rates(rounding)  # compiles, and starts CUDA
    # As Ray's driver and every part but the first do, it knows whether tied tensors differ.
    untied = frozenset[str]()
    click.echo("ready")
    sys.stdin.readline()
    click.echo(json.dumps(measure_rates(rounding).to_json()))
    sys.stdin.readline()
    begin, used = time.time(), time.process_time()
    QuantizePart(stage, Part.parse(part), untied).ensure()
    click.echo(json.dumps([begin, time.time(), time.process_time() - used]))


def _settle(cold: bool) -> None:
    os.sync()
    if cold:
        _DROP_CACHES.write_text("3")


def _limit(folder: Path, build: Build, cold: bool) -> tuple[float, float]:
    """Seconds of reading the source, and of writing what comes of it, synced, with 8 threads."""
    paths = sorted((folder / "model").glob("*.safetensors"))
    _settle(cold)
    begin = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_read, paths))
    read = time.perf_counter()
    sizes = [
        layout.nbytes for layout in Quantize(build, Recipe(), Machine()).plan().layouts().values()
    ]
    content = memoryview(os.urandom(_CHUNK))
    target = folder / "limit"
    target.mkdir()
    start = time.perf_counter()

    def write(numbered: tuple[int, int]) -> None:
        number, size = numbered
        descriptor = os.open(target / str(number), os.O_RDWR | os.O_CREAT)
        for offset in range(0, size, _CHUNK):
            write_at(descriptor, content[: size - offset], offset)
        os.fsync(descriptor)
        os.close(descriptor)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, enumerate(sizes)))
    wrote = time.perf_counter() - start
    shutil.rmtree(target)
    return read - begin, wrote


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(4 * 2**20)
        while file.readinto(buffer):
            pass


MODELS: dict[str, tuple[float, int, int]] = {
    # name: bytes of the source in bf16, its files, how many such models
    "falcon-7b": (14.43e9, 2, 1),
    "Falcon-180B": (360e9, 81, 1),
    "Llama 405B": (810e9, 191, 1),
    "100 models of 7B": (14.43e9, 2, 100),
}
_TWO: dict[str, Any] = {"rates": Rates(sha256=2_800_000_000, weights=1_350_000_000)}
_SIXTEEN: dict[str, Any] = {"rates": Rates(sha256=19_200_000_000, weights=4_000_000_000)}
SETUPS: dict[str, Hosts] = {
    # Rates of processors and disks as measured (docs/performance.md).
    "2 cores, 0.1 GB/s network, 0.5 GB/s disk": Hosts(
        **_TWO, processors=2, network=1e8, disk_read=5e8, disk_write=5e8, efficiency=_EFFICIENCY
    ),
    "16 cores, 1 GB/s network, 2.2 / 1.6 GB/s disk": Hosts(
        **_SIXTEEN,
        processors=16,
        network=1e9,
        disk_read=2.2e9,
        disk_write=1.6e9,
        efficiency=_EFFICIENCY,
    ),
    "8 such hosts and that one disk": Hosts(
        **_SIXTEEN,
        processors=16,
        count=8,
        network=1e9,
        disk_read=2.2e9,
        disk_write=1.6e9,
        start=10.0,
        efficiency=_EFFICIENCY,
    ),
    "8 such hosts, 20 / 10 GB/s file system": Hosts(
        **_SIXTEEN,
        processors=16,
        count=8,
        network=1e9,
        disk_read=20e9,
        disk_write=10e9,
        start=10.0,
        efficiency=_EFFICIENCY,
    ),
}


def _extrapolate() -> None:
    """Prints what the model says of known models."""
    click.echo("| model | on | download | quantize | merge | in all |")
    click.echo("| --- | --- | --- | --- | --- | --- |")
    for name, (nbytes, files, models) in MODELS.items():
        output = nbytes / 16 * _BITS
        work = Work(
            source_bytes=int(nbytes),
            largest_source=int(nbytes / files),
            weights=int(nbytes / 2),
            output_bytes=int(output),
            files=max(files, math.ceil(output / 1e9)),
        )
        for setup, hosts in SETUPS.items():
            took = [
                models * seconds(work, hosts)
                for seconds in (download_seconds, quantize_seconds, merge_seconds)
            ]
            shown = " | ".join(_duration(value) for value in (*took, sum(took)))
            click.echo(f"| {name} | {setup} | {shown} |")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    main()
