"""Runs the tests that need a CUDA device, and prints a table of them with the machine's name."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import click
import torch

_TESTS = Path(__file__).resolve().parents[2] / "tests" / "gpu"


@click.command()
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(options: tuple[str, ...]) -> None:
    """Run tests/gpu; OPTIONS, after --, go to pytest. Exits as pytest does."""
    if not torch.cuda.is_available():
        raise click.ClickException(
            "torch finds no CUDA device here, so every test would be skipped."
        )
    with tempfile.TemporaryDirectory(prefix="nf4-gpu-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", str(_TESTS)]
        code = subprocess.run([*command, *options], check=False).returncode
        if not report.is_file():
            sys.exit(code)
        cases = list(ElementTree.parse(report).iter("testcase"))
    click.echo(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    click.echo("| test | passed | failed | skipped |\n| --- | --- | --- | --- |")
    counts: dict[str, Counter[str]] = {}
    for case in cases:
        name = case.attrib["name"].partition("[")[0]
        found = {child.tag for child in case}
        what = (
            "skipped"
            if "skipped" in found
            else "failed"
            if found & {"failure", "error"}
            else "passed"
        )
        counts.setdefault(name, Counter())[what] += 1
    for name, count in counts.items():
        click.echo(f"| {name} | {count['passed']} | {count['failed']} | {count['skipped']} |")
    sys.exit(code)


if __name__ == "__main__":
    main()
