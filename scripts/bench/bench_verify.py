"""Times the comparison with the 16-bit model on checkpoints with the shapes of falcon-7b.

Builds one (quantize and serialize), verifies it with the text that nf4 would use or, since such a
checkpoint has no tokenizer, as many random token ids, and prints what the comparison itself took:
seconds, peak memory of the device and of the process. The first round reads a warm page cache if
the machine has the memory to keep the files.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from falcon_shapes import make_checkpoint


@click.command()
@click.option("--layers", default="2", show_default=True, help="Depths, separated by commas.")
@click.option("--rounds", default=2, show_default=True)
@click.option("--tokens", default=8192, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--device-memory", default="", help='Limits, separated by commas, such as "8GB".')
@click.option("--folder", type=click.Path(path_type=Path), help="Where checkpoints are made.")
def main(
    layers: str, rounds: int, tokens: int, device: str, device_memory: str, folder: Path | None
) -> None:
    """Verify falcon-7b-shaped checkpoints of some depths."""
    click.echo("| layers | limit | comparison s | device GB | host GB | load s | load GB | KL |")
    click.echo("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="nf4-bench-") as temporary:
        for depth in (int(part) for part in layers.split(",")):
            source = (folder or Path(temporary)) / f"falcon-{depth}"
            if not (source / "config.json").exists():
                make_checkpoint(source, depth)
            build = Path(temporary) / f"build-{depth}"
            _nf4("download", source, "--build-dir", build)
            for stage in ("quantize", "serialize"):
                _nf4(stage, "--build-dir", build, "--device", device)
            for limit in device_memory.split(","):
                for _ in range(rounds):
                    _show(depth, limit, _verify(build, device, tokens, limit))


def _verify(build: Path, device: str, tokens: int, limit: str) -> dict[str, Any]:
    (build / "records" / "verify.json").unlink(missing_ok=True)
    options = ["--device-memory", limit] if limit else []
    _nf4(
        "verify", "--build-dir", build, "--device", device, "--eval-tokens", tokens, *options,
        may_fail=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads((build / "export" / "verification.json").read_text())
    if "comparison" not in found:
        raise click.ClickException(f"the comparison did not run: {found['checks']}")
    return found


def _show(depth: int, limit: str, found: dict[str, Any]) -> None:
    taken, model = found["comparison"], found["models"]["4bit"]
    row = (
        depth,
        limit or "none",
        f"{taken['seconds']:.1f}",
        f"{taken['peak_device_memory_bytes'] / 1e9:.2f}",
        f"{taken['peak_memory_bytes'] / 1e9:.2f}",
        f"{model['load_seconds']:.1f}",
        f"{model['peak_device_memory_bytes'] / 1e9:.2f}",
        f"{found['fidelity']['mean_kl']['value']:.6f}",
    )
    click.echo("| " + " | ".join(str(cell) for cell in row) + " |")


def _nf4(*arguments: object, may_fail: bool = False) -> None:
    """Runs a command; a verdict of "fail" is a finding here, and not an error."""
    command = [sys.executable, "-m", "nf4_pipeline", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 and not may_fail:
        raise click.ClickException(f"{' '.join(command)}\n{done.stderr}")
    if done.returncode != 0:
        click.echo(done.stdout + done.stderr, err=True)


if __name__ == "__main__":
    main()
