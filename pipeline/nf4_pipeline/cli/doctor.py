"""nf4 doctor"""

from __future__ import annotations

import sys
from typing import Final

import click

from nf4_pipeline.cli.help import CommandWithExamples
from nf4_pipeline.cli.options import ARTIFACTS, Ui, output_options
from nf4_pipeline.cli.terminal import say
from nf4_pipeline.doctor import MachineReport, examine
from nf4_pipeline.progress import LOADING

_MARKS: Final = {"ok": "ok      ", "note": "note    ", "problem": "PROBLEM "}


@click.command(
    "doctor",
    cls=CommandWithExamples,
    examples=(
        ("nf4 doctor", "For people."),
        ("nf4 doctor --json", "For programs."),
    ),
)
@output_options
def command(ui: Ui) -> None:
    """Say what this machine has for the job, and which known traps lie on it.

    Exits 1 if something has to be done before nf4 can work.
    """
    with ui.reporter().task(LOADING, None):
        report = examine(ARTIFACTS)
    ui.result(report.to_json(), lambda: _show(report))
    if any(finding.kind == "problem" for finding in report.findings):
        sys.exit(1)


def _show(report: MachineReport) -> None:
    memory = report.available_memory_bytes
    free = f", {memory / 1e9:.1f} GB of memory free" if memory else ""
    say(f"  nf4-pipeline {report.nf4_pipeline}, Python {report.python}")
    say(f"  {report.system}, {report.processors} processors{free}")
    for gpu in report.gpus:
        major, minor = gpu.capability
        say(
            f"  GPU        {gpu.name}, {gpu.memory_bytes / 1e9:.1f} GB, compute capability "
            f"{major}.{minor}"
        )
    for name, version in report.libraries.items():
        say(f"  {name:<17} {version or 'not installed'}")
    for name, disk in report.disks.items():
        say(f"  {name.replace('_', ' '):<17} {disk.free_bytes / 1e9:.1f} GB free at {disk.folder}")
    token = "with a token" if report.hub.token else "no token"
    say(f"  Hub               {report.hub.endpoint}, {token}")
    say()
    for finding in report.findings:
        say(f"  {_MARKS[finding.kind]}{finding.text}")
