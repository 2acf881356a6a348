"""nf4 quantize"""

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


@click.command("quantize")
@click.argument("model", required=False)
@build_dir_option
@settings_options
@output_options
def command(ui: Ui, settings: Settings, model: str | None, build_dir: Path | None) -> None:
    """Turn the linear layers of a downloaded checkpoint into NF4 codes.

    MODEL is what the build was started with; without it, the newest build is meant.
    """
    run_one_stage("quantize", ui, settings, model, build_dir)
