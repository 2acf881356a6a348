"""nf4 serialize"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.options import (
    Ui,
    build_dir_option,
    output_options,
    run_one_stage,
    settings_options,
)

if TYPE_CHECKING:
    from pipeline.stages import Settings


@click.command("serialize")
@click.argument("model", required=False)
@build_dir_option
@settings_options
@output_options
def command(ui: Ui, settings: Settings, model: str | None, build_dir: Path | None) -> None:
    """Write the publishable folder of a quantized build, with its manifest.

    MODEL is what the build was started with; without it, the newest build is meant.
    """
    run_one_stage("serialize", ui, settings, model, build_dir)
