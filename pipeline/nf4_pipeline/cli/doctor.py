"""nf4 doctor"""

from __future__ import annotations

import sys
from typing import Any, Final

import click

from nf4_pipeline.cli.options import ARTIFACTS, Ui, output_options

_MARKS: Final = {"ok": "ok      ", "note": "note    ", "problem": "PROBLEM "}


@click.command("doctor")
@output_options
def command(ui: Ui) -> None:
    """Say what this machine has for the job, and which known traps lie on it.

    Exits 1 if something has to be done before nf4 can work.
    """
    from nf4_pipeline.doctor import examine

    found = examine(ARTIFACTS)
    ui.result(found, lambda: _show(found))
    if any(finding["kind"] == "problem" for finding in found["findings"]):
        sys.exit(1)


def _show(found: dict[str, Any]) -> None:
    memory = found["available_memory_bytes"]
    free = f", {memory / 1e9:.1f} GB of memory free" if memory else ""
    click.echo(f"  nf4-pipeline {found['nf4_pipeline']}, Python {found['python']}")
    click.echo(f"  {found['system']}, {found['processors']} processors{free}")
    for gpu in found["gpus"]:
        major, minor = gpu["capability"]
        click.echo(
            f"  GPU        {gpu['name']}, {gpu['memory_bytes'] / 1e9:.1f} GB, compute capability "
            f"{major}.{minor}"
        )
    for name, version in found["libraries"].items():
        click.echo(f"  {name:<17} {version or 'not installed'}")
    for name, disk in found["disks"].items():
        click.echo(
            f"  {name.replace('_', ' '):<17} {disk['free_bytes'] / 1e9:.1f} GB free at "
            f"{disk['folder']}"
        )
    hub = found["hub"]
    token = "with a token" if hub["token"] else "no token"
    click.echo(f"  Hub               {hub['endpoint']}, {token}")
    click.echo()
    for finding in found["findings"]:
        click.echo(f"  {_MARKS[finding['kind']]}{finding['text']}")
