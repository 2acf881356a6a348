"""nf4 serialize"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nf4_pipeline.cli.options import (
    Ui,
    build_dir_option,
    output_options,
    run_one_stage,
    settings_options,
)

if TYPE_CHECKING:
    from nf4_pipeline.stages import Settings


@click.command("serialize")
@click.argument("model", required=False)
@click.option("--max-shard-size", help='Such as "5GB" or "500MB"; wins over the recipe.')
@build_dir_option
@settings_options
@output_options
def command(
    ui: Ui,
    settings: Settings,
    model: str | None,
    max_shard_size: str | None,
    build_dir: Path | None,
) -> None:
    """Write the publishable folder of a quantized build, with its manifest.

    MODEL is what the build was started with; without it, the newest build is meant.
    """
    if max_shard_size is not None:
        serialize = replace(settings.recipe.serialize, max_shard_size=max_shard_size)
        settings = replace(settings, recipe=replace(settings.recipe, serialize=serialize))
    run_one_stage("serialize", ui, settings, model, build_dir)
