"""Times `nf4 quantize --calibrate self` on checkpoints with the shapes of falcon-7b.

Each round is a build of its own in a process of its own, from a warm page cache if the machine has
the memory to keep the files; making the checkpoint and `nf4 download` are not counted. Figures are
those of the record that quantizing leaves:

    sampling  the model writes the tokens; imports and starting CUDA are in it
    pass      loading, then the walk of all tokens through all blocks
    walk      the walk alone; beside it, in threads of their own, run guides, choices and writing,
              and "waiting" is what the walk waited for them
    measuring which layers lose most (only with --extra-bytes)
    engine    everything else: codes and scales into files, their hashes, fsync

The weights are random and there is no tokenizer, so the tokens mean nothing; what it costs does not
depend on that.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from falcon_shapes import make_checkpoint

COLUMNS = (
    "layers", "tokens", "stage s", "sampling s", "pass s", "walk s", "inputs s", "sums s",
    "factors s", "corrections s", "choices s", "writing s", "waiting s", "measuring s", "engine s",
    "process s", "sampling GPU GB", "pass GPU GB", "measuring GPU GB", "host GB",
)  # fmt: skip
_PARTS = (
    "whole", "inputs", "sums", "factors", "corrections", "choices", "writing",
    "waiting for writing",
)  # fmt: skip


@click.command()
@click.option("--layers", default="1", show_default=True, help="Depths, separated by commas.")
@click.option("--shards", default=2, show_default=True, help="Files of the checkpoint.")
@click.option("--rounds", default=1, show_default=True)
@click.option("--tokens", default=2048, show_default=True, help="What nf4 would use is 16384.")
@click.option("--extra-bytes", default="", help='Also measure layers, such as "5%".')
@click.option("--device", default="auto", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where checkpoints are made.")
@click.option("--json", "as_json", type=click.Path(path_type=Path), help="Also write all figures.")
def main(
    layers: str,
    shards: int,
    rounds: int,
    tokens: int,
    extra_bytes: str,
    device: str,
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
            f'extra_bytes = "{extra_bytes}"\n'
        )
        for depth in (int(part) for part in layers.split(",")):
            source = (folder or work) / f"falcon-{depth}-{shards}"
            if not (source / "config.json").exists():
                total = make_checkpoint(source, depth, shards=shards)
                click.echo(f"made {source}: {total / 1e9:.2f} GB", err=True)
            for number in range(rounds):
                found = _round(source, work / "build", recipe, device)
                figures.append({"layers": depth, "round": number, **found})
                if len(figures) == 1:
                    _row(COLUMNS)
                    _row("---" for _ in COLUMNS)
                _row(_cells(depth, found))
            if folder is None:
                shutil.rmtree(source)
    if as_json:
        as_json.write_text(json.dumps(figures, indent=2))


def _round(source: Path, build: Path, recipe: Path, device: str) -> dict[str, Any]:
    """Quantizes afresh; returns what the record says."""
    shutil.rmtree(build, ignore_errors=True)
    _nf4("download", source, "--build-dir", build)
    start = time.perf_counter()
    _nf4("quantize", "--build-dir", build, "--recipe", recipe, "--device", device)
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


def _cells(depth: int, found: dict[str, Any]) -> list[object]:
    calibration = found["calibration"]
    seconds, memory = calibration["seconds"], calibration["peak_device_memory_bytes"]
    apart = ("sampling", "pass", "sensitivity")
    engine = found["stage"] - sum(seconds[name] for name in apart)
    return [
        depth,
        f"{calibration['tokens']:,}",
        *(
            f"{value:.1f}"
            for value in (
                found["stage"],
                seconds["sampling"],
                seconds["pass"],
                *(seconds.get(name, 0.0) for name in _PARTS),
                seconds["sensitivity"],
                engine,
                found["process"],
            )
        ),
        *(f"{memory[name] / 1e9:.2f}" for name in apart),
        f"{found['host'] / 1e9:.2f}",
    ]


def _row(cells: Any) -> None:
    click.echo("| " + " | ".join(str(cell) for cell in cells) + " |")


def _nf4(*arguments: object) -> None:
    """Runs a command; its progress goes to stderr."""
    command = [sys.executable, "-m", "nf4_pipeline", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise click.ClickException(f"{' '.join(command)} ended with {done.returncode}")


if __name__ == "__main__":
    main()
