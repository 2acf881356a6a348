"""What a build would read, write and take, before a byte of weights moves."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final, Literal

import numpy as np

from nf4_pipeline.documents import Document, optional
from nf4_pipeline.engine.quantize_checkpoint import CheckpointPlanner
from nf4_pipeline.machine import Machine
from nf4_pipeline.manifest.assemble import totals
from nf4_pipeline.manifest.manifest import Totals
from nf4_pipeline.nf4.packing import packed_bytes
from nf4_pipeline.nf4.rounding import Rounding
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.resource_usage import free_space, nearest_folder
from nf4_pipeline.selection import Plan
from nf4_pipeline.stages.cost_model import (
    Hosts,
    Rates,
    Work,
    download_seconds,
    quantize_seconds,
)
from nf4_pipeline.stages.download_request import DownloadRequest
from nf4_pipeline.stages.find_source import Place, Preview, SourceFinder
from nf4_pipeline.stages.outgoing import room_for
from nf4_pipeline.stages.quantize import memory_needed
from nf4_pipeline.stages.rounding_choice import rounding_for
from nf4_pipeline.stages.streamed_bytes import StreamedBytes
from nf4_pipeline.streaming.passing import AHEAD
from nf4_pipeline.verification.eval_text import most_passes

_MEASURED_WEIGHTS: Final = 4 * 2**20
_MEASURED_BYTES: Final = 64 * 2**20
_MEASURING_SECONDS: Final = 0.25
_SMALL_FILES: Final = 32 * 2**20  # bytes; tokenizer, report and pictures have less


@dataclass(frozen=True, kw_only=True)
class ForecastSource(Document):
    """Which checkpoint it is: its name, and the commit of a Hub model."""

    name: str
    commit: str | None = optional()


@dataclass(frozen=True, kw_only=True)
class Space(Document):
    """A place on a disk: its folder, what would be written there, and what is free, in bytes."""

    folder: str
    needed: int
    free: int


@dataclass(frozen=True, kw_only=True)
class Forecast(Document):
    """What a build would read, write and take, as `nf4 build --dry-run --json` says it.

    Attributes:
        source: the checkpoint.
        build: where the build folder would be; of a local folder, what it would be in, since its
            name holds a hash of all files.
        source_bytes: of its files of weights.
        fetch_bytes: of those that are not in the Hub cache yet; where they are streamed, of all
            that is fetched: to be quantized, to be made again if `lying_bytes` says so, and to be
            compared with the result.
        window_bytes: of the source that are in memory at a time, if it is streamed; else 0.
        lying_bytes: of the result that lie in the build folder at a time, if source and result are
            streamed; else 0. Verify makes all of it again, in memory.
        quantized_bytes: of the files of quantized weights.
        files: their names and sizes, to the byte.
        totals: those that the manifest would have.
        kept: reason -> bytes of what stays in 16 bit.
        dropped: reason -> bytes of what would not be in the artifact.
        skip_modules: what readers are told to leave alone.
        extra_bytes: that --extra-bytes may add at most.
        memory_bytes: that quantizing takes at most, beside the interpreter and its libraries.
        hub_cache: for the source; None for a local folder.
        builds: for the build folder.
        fits: the disks have room for both.
        rates: of this machine, all processors together, as just measured.
        seconds: that the stages take by these rates; what a network takes is not among them.
    """

    source: ForecastSource
    build: str
    source_bytes: int
    fetch_bytes: int
    window_bytes: int = 0
    lying_bytes: int = 0
    quantized_bytes: int
    files: Mapping[str, int]
    totals: Totals
    kept: Mapping[str, int]
    dropped: Mapping[str, int]
    skip_modules: tuple[str, ...]
    extra_bytes: int
    memory_bytes: int
    hub_cache: Space | None = optional()
    builds: Space
    fits: bool
    rates: Rates
    seconds: Mapping[str, float]


def forecast(
    request: DownloadRequest,
    recipe: Recipe,
    machine: Machine,
    reporter: Reporter = SILENT,
    *,
    sends: bool = False,
) -> Forecast:
    """Plans a build by the headers of its source, and measures this machine for a moment.

    Of a Hub model, small files and the beginning of each file of weights are fetched. No build
    folder is made.

    Args:
        request: the model.
        recipe: everything that would shape the bytes.
        machine: what the work may use.
        reporter: told what is done.
        sends: finished files are sent to the Hub while others are made.

    Raises:
        SourceError: the checkpoint is not usable, or nothing can be known of its weights before
            they are read.
        HubError: the Hub could not be asked, or sent wrong bytes.
        UsageError: the request means nothing, or the memory budget is too small.
    """
    finder = SourceFinder(request, reporter)
    place = finder.locate()
    with finder.preview(place) as preview:
        planner = CheckpointPlanner(preview.checkpoint, preview.found.architecture, recipe.quantize)
        plan = planner.plan()
    rounding = rounding_for(machine.device, preview.checkpoint.nbytes, reporter)
    with reporter.task("measure this machine", None):
        rates = measure_rates(rounding)
    return _assemble(request, recipe, machine, place, preview, plan, rates, sends=sends)


def _assemble(
    request: DownloadRequest,
    recipe: Recipe,
    machine: Machine,
    place: Place,
    preview: Preview,
    plan: Plan,
    rates: Rates,
    *,
    sends: bool,
) -> Forecast:
    files = {file: layout.nbytes for file, layout in plan.layouts().items()}
    quantized, fetched = sum(files.values()), sum(preview.missing.values())
    all_totals = totals(plan)
    extra = int(all_totals.quantized_bytes * recipe.quantize.extra_share)
    folder = request.build_dir or request.artifacts
    if request.build_dir is None and place.commit is not None:
        folder = request.build(place.pin.slug).root
    needed = quantized + extra + _SMALL_FILES
    if recipe.quantize.calibrate:  # its choices stand beside them until all is written
        chosen = sum(part.nbytes for tensor in plan.quantized for part in tensor.stored)
        needed += chosen * (2 if recipe.quantize.effort else 1)  # calibrated, and learned
    if any(size > recipe.serialize.max_shard_bytes for size in files.values()):
        needed += quantized + extra  # what is cut anew is no hard link
    window = lying = 0
    if request.stream and preview.missing:
        window = min(AHEAD, sum(preview.weights.values()))
        local = machine.engine == "local"
        if sends and local and max(files.values()) <= recipe.serialize.max_shard_bytes:
            lying = room_for(files.values())
            needed = lying + _SMALL_FILES
        streamed = StreamedBytes(preview.checkpoint, preview.weights, plan)
        fetched = streamed.to_quantize(lying or None, of_tasks=not local)
        fetched += streamed.to_make_again() if lying else 0
        fetched += streamed.to_compare(most_passes(recipe.verify.eval_tokens))
    cache = None
    if place.model is not None:
        cache = _space(place.folder.parents[1], 0 if window else fetched)
    builds = _space(folder, needed)
    return Forecast(
        source=ForecastSource(name=place.repo, commit=place.commit),
        build=str(folder),
        source_bytes=sum(preview.weights.values()),
        fetch_bytes=fetched,
        window_bytes=window,
        lying_bytes=lying,
        quantized_bytes=quantized,
        files=files,
        totals=all_totals,
        kept=_by_reason(plan, "keep"),
        dropped=_by_reason(plan, "drop"),
        skip_modules=plan.skip_modules,
        extra_bytes=extra,
        memory_bytes=memory_needed(plan, machine.memory_budget) + window,
        hub_cache=cache,
        builds=builds,
        fits=_fit([space for space in (cache, builds) if space is not None]),
        rates=rates,
        seconds=_seconds(preview.weights, plan, quantized, rates),
    )


def _by_reason(plan: Plan, action: Literal["keep", "drop"]) -> dict[str, int]:
    found: dict[str, int] = {}
    for tensor in plan.by_action(action):
        found[tensor.reason] = found.get(tensor.reason, 0) + tensor.source.header.nbytes
    return dict(sorted(found.items()))


def _space(folder: Path, needed: int) -> Space:
    return Space(folder=str(folder), needed=needed, free=free_space(folder))


def _fit(spaces: Sequence[Space]) -> bool:
    """Whether there is room for all of them; several may be on one disk."""
    needed: dict[int, int] = {}
    free: dict[int, int] = {}
    for space in spaces:
        disk = nearest_folder(Path(space.folder)).stat().st_dev
        needed[disk] = needed.get(disk, 0) + space.needed
        free[disk] = min(free.get(disk, space.free), space.free)
    return all(needed[disk] <= free[disk] for disk in needed)


def _seconds(
    weights: Mapping[str, int], plan: Plan, quantized: int, rates: Rates
) -> dict[str, float]:
    """What the work takes where nothing waits for a disk or a network."""
    work = Work(
        source_bytes=sum(weights.values()),
        largest_source=max(weights.values()),
        weights=sum(prod(tensor.shape) for tensor in plan.quantized),
        output_bytes=quantized,
        files=len(plan.layouts()),
    )
    hosts = Hosts(rates=rates, processors=len(os.sched_getaffinity(0)))
    return {
        "download": round(download_seconds(work, hosts), 1),
        "quantize": round(quantize_seconds(work, hosts), 1),
    }


def measure_rates(rounding: Rounding) -> Rates:
    """What this machine does in a second, measured for a moment on data that fit into its caches.

    Args:
        rounding: that would quantize.
    """
    processors = len(os.sched_getaffinity(0))
    data = bytes(_MEASURED_BYTES // 16)

    def hash_some() -> int:
        hashlib.sha256(data).digest()
        return len(data)

    bits = np.random.default_rng(0).normal(size=_MEASURED_WEIGHTS).astype(np.float32)
    source = (bits.view(np.uint32) >> 16).astype(np.uint16)

    def quantize_some() -> int:
        given, packed = rounding.buffer(source.nbytes), rounding.buffer(packed_bytes(source.size))
        given[:] = source.view(np.uint8)
        weight = rounding.start_weight("measured", source.size)
        weight.quantize_chunk(given.view(np.uint16), "bfloat16", 0, packed)
        return source.size

    quantize_some()  # compiles
    return Rates(
        sha256=_rate(hash_some, processors), weights=_rate(quantize_some, rounding.workers)
    )


def _rate(work: Callable[[], int], threads: int) -> int:
    """How much is done in a second by threads at once."""
    begin = time.perf_counter()
    end = begin + _MEASURING_SECONDS

    def repeat() -> int:
        done = work()
        while time.perf_counter() < end:
            done += work()
        return done

    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(lambda _: repeat(), range(threads)))
    return int(done / (time.perf_counter() - begin))
