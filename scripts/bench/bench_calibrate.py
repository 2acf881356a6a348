"""Times `nf4 quantize --calibrate self` on checkpoints with the shapes of falcon-7b.

    python scripts/bench/bench_calibrate.py --layers 32 --tokens 16384
    python scripts/bench/bench_calibrate.py --layers 32 --tokens 16384 --gpus 1,2
    python scripts/bench/bench_calibrate.py --layers 32 --tokens 16384 --effort high
    python scripts/bench/bench_calibrate.py ... --effort high --free-memory 24  # block by block

Each round is a build of its own in a process of its own, from a warm page cache if the machine has
the memory to keep the files; making the checkpoint and `nf4 download` are not counted. Figures are
those of the record that quantizing leaves:

    sampling  the model writes the tokens; imports and starting CUDA are in it
    pass      loading, then the walk of all tokens through all blocks
    walk      the walk alone; beside it, in threads of their own, run guides, choices and writing,
              and "waiting" is what the walk waited for them
    measuring which layers lose most (only with --extra-bytes)
    drawing   the model writes what codes learn from (only with --effort high)
    steps     they learn
    engine    everything else: codes and scales into files, their hashes, fsync

The weights are random and there is no tokenizer, so the tokens mean nothing; what it costs does not
depend on that. With --free-memory another process takes the rest of the GPU meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from falcon_shapes import make_checkpoint

COLUMNS = (
    "layers", "GPUs", "tokens", "stage s", "sampling s", "pass s", "walk s", "inputs s", "sums s",
    "factors s", "corrections s", "choices s", "writing s", "waiting s", "measuring s", "drawing s",
    "steps s", "engine s", "process s", "sampling GPU GB", "pass GPU GB", "measuring GPU GB",
    "learning GPU GB", "host GB",
)  # fmt: skip
_PARTS = (
    "whole", "inputs", "sums", "factors", "corrections", "choices", "writing",
    "waiting for writing",
)  # fmt: skip

_HOLD = (
    "import sys, torch; rest = torch.cuda.mem_get_info()[0] - int(sys.argv[1]); "
    "held = torch.empty(max(0, rest), dtype=torch.uint8, device='cuda'); "
    "print(flush=True); sys.stdin.read()"
)
"""Takes the memory of the first GPU but for so many bytes, as long as somebody is there."""


@dataclass(frozen=True)
class Bench:
    """What all rounds have in common.

    Attributes:
        build: the folder that each of them builds in.
        recipe: a file.
        device: of `nf4 quantize`.
        free_memory: bytes of the first GPU that are left to it; 0 for all.
    """

    build: Path
    recipe: Path
    device: str
    free_memory: int


@dataclass
class Passes:
    """What one depth gave with each number of GPUs.

    Attributes:
        seconds: of the pass, the fastest round.
        files: the hashes of each round.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    files: list[dict[str, str]] = field(default_factory=list)

    def add(self, gpus: int, found: dict[str, Any]) -> None:
        taken = found["calibration"]["seconds"]["pass"]
        self.seconds[gpus] = min(taken, self.seconds.get(gpus, taken))
        self.files.append(found["quantized"])

    def __str__(self) -> str:
        fewest, same = min(self.seconds), all(files == self.files[0] for files in self.files)
        ratios = (
            f"{self.seconds[fewest] / self.seconds[gpus]:.2f} x faster with {gpus}"
            for gpus in sorted(self.seconds)[1:]
        )
        return f"the pass: {', '.join(ratios)}; {'the same' if same else 'OTHER'} files"


@click.command()
@click.option("--layers", default="1", show_default=True, help="Depths, separated by commas.")
@click.option("--shards", default=2, show_default=True, help="Files of the checkpoint.")
@click.option("--rounds", default=1, show_default=True)
@click.option("--tokens", default=2048, show_default=True, help="What nf4 would use is 16384.")
@click.option("--extra-bytes", default="", help='Also measure layers, such as "5%".')
@click.option("--effort", default="", help='Also let codes learn: "high".')
@click.option("--device", default="auto", show_default=True)
@click.option("--gpus", default="", help="How many are to be seen, in turn, separated by commas.")
@click.option("--free-memory", default=0.0, help="GB that the first GPU has free; 0 for all.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where checkpoints are made.")
@click.option("--json", "as_json", type=click.Path(path_type=Path), help="Also write all figures.")
def main(
    layers: str,
    shards: int,
    rounds: int,
    tokens: int,
    extra_bytes: str,
    effort: str,
    device: str,
    gpus: str,
    free_memory: float,
    folder: Path | None,
    as_json: Path | None,
) -> None:
    """Calibrate falcon-7b-shaped checkpoints of some depths."""
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="nf4-bench-") as temporary:
        work = Path(temporary)
        recipe = work / "recipe.toml"
        recipe.write_text(
            f'[quantize]\ncalibrate = "self"\ncalibration_tokens = {tokens}\n'
            f'extra_bytes = "{extra_bytes}"\neffort = "{effort}"\n'
        )
        bench = Bench(work / "build", recipe, device, int(free_memory * 1e9))
        for depth in (int(part) for part in layers.split(",")):
            source = (folder or work) / f"falcon-{depth}-{shards}"
            if not (source / "config.json").exists():
                total = make_checkpoint(source, depth, shards=shards)
                click.echo(f"made {source}: {total / 1e9:.2f} GB", err=True)
            passes = Passes()
            for seen in [int(part) for part in gpus.split(",")] if gpus else [0]:
                for number in range(rounds):
                    found = _round(source, bench, seen)
                    passes.add(seen, found)
                    figures.append({"layers": depth, "gpus": seen, "round": number, **found})
                    if len(figures) == 1:
                        _row(COLUMNS)
                        _row("---" for _ in COLUMNS)
                    _row(_cells(depth, seen, found))
            if gpus:
                click.echo(f"\n{depth} layers, {passes}\n")
            if folder is None:
                shutil.rmtree(source)
    if as_json:
        as_json.write_text(json.dumps(figures, indent=2))


def _round(source: Path, bench: Bench, gpus: int) -> dict[str, Any]:
    """Quantizes afresh with so many GPUs, 0 for all; returns what the record says."""
    build = bench.build
    shutil.rmtree(build, ignore_errors=True)
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))} if gpus else {}
    _nf4(seen, "download", source, "--build-dir", build)
    options = ("--build-dir", build, "--recipe", bench.recipe, "--device", bench.device)
    with _held(bench.free_memory):
        start = time.perf_counter()
        _nf4(seen, "quantize", *options)
        process = time.perf_counter() - start
    record = json.loads((build / "records" / "quantize.json").read_text())
    calibration = record["facts"]["calibration"]
    if calibration["fallbacks"]:
        click.echo(f"not calibrated: {calibration['fallbacks']}", err=True)
    return {
        "process": process,
        "stage": record["seconds"],
        "host": record["peak_memory_bytes"],
        "calibration": {n: v for n, v in calibration.items() if n != "kept"},
        "kept": len(calibration["kept"]),
        "quantized": {name: digest["sha256"] for name, digest in record["outputs"].items()},
    }


@contextmanager
def _held(free: int) -> Iterator[None]:
    """While the body runs, the first GPU has so many bytes free; 0 for all."""
    if not free:
        yield
        return
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(free)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise click.ClickException("the memory of the GPU could not be taken")
        try:
            yield
        finally:
            process.kill()


def _cells(depth: int, gpus: int, found: dict[str, Any]) -> list[object]:
    calibration = found["calibration"]
    seconds, memory = calibration["seconds"], calibration["peak_device_memory_bytes"]
    apart = ("sampling", "pass", "sensitivity", "learning")
    engine = found["stage"] - sum(seconds.get(name, 0.0) for name in apart)
    return [
        depth,
        gpus or "all",
        f"{calibration['tokens']:,}",
        *(
            f"{value:.1f}"
            for value in (
                found["stage"],
                seconds["sampling"],
                seconds["pass"],
                *(seconds.get(name, 0.0) for name in _PARTS),
                seconds["sensitivity"],
                seconds.get("drawing", 0.0),
                seconds.get("steps", 0.0),
                engine,
                found["process"],
            )
        ),
        *(f"{memory.get(name, 0) / 1e9:.2f}" for name in apart),
        f"{found['host'] / 1e9:.2f}",
    ]


def _row(cells: Any) -> None:
    click.echo("| " + " | ".join(str(cell) for cell in cells) + " |")


def _nf4(variables: dict[str, str], *arguments: object) -> None:
    """Runs a command; its progress goes to stderr."""
    command = [sys.executable, "-m", "nf4_pipeline", *map(str, arguments)]
    environment = os.environ | variables
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise click.ClickException(f"{' '.join(command)} ended with {done.returncode}")


if __name__ == "__main__":
    main()
