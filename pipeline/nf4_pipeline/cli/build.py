"""nf4 build MODEL"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nf4_pipeline.cli.options import (
    ARTIFACTS,
    Ui,
    build_dir_option,
    output_options,
    settings_options,
    source_options,
)

if TYPE_CHECKING:
    from nf4_pipeline.stages import Settings


@click.command("build")
@click.argument("model")
@source_options
@build_dir_option
@settings_options
@output_options
def command(
    ui: Ui, settings: Settings, model: str, source: dict[str, Any], build_dir: Path | None
) -> None:
    """Download, quantize, serialize, verify, attest MODEL: a Hub id, a local folder, or "sample".

    What is done and still valid is not done again. Exits 1 if the verdict is "fail".
    """
    from nf4_pipeline.cli.summary import show_summary, summary
    from nf4_pipeline.job import run_build

    build, results = run_build(
        model, ARTIFACTS, settings, ui.reporter(), build_dir=build_dir, **source
    )
    value = summary(build, results)
    ui.result(value, lambda: show_summary(value))
    if value["verdict"] != "pass":
        sys.exit(1)
