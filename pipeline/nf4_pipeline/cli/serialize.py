"""nf4 serialize"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nf4_pipeline.cli.options import (
    Ui,
    build_dir_option,
    existing_build,
    output_options,
    recipe_options,
    run_one_stage,
)

if TYPE_CHECKING:
    from nf4_pipeline.machine import Machine
    from nf4_pipeline.recipe import PartialRecipe


@click.command("serialize")
@click.argument("model", required=False)
@click.option("--max-shard-size", help='Such as "500MB", at most 1GB; wins over the recipe.')
@build_dir_option
@recipe_options
@output_options
def command(
    ui: Ui,
    recipe: PartialRecipe,
    machine: Machine,
    model: str | None,
    max_shard_size: str | None,
    build_dir: Path | None,
) -> None:
    """Write the publishable folder of a quantized build, with its manifest.

    MODEL is what the build was started with; without it, the newest build is meant.
    """
    from nf4_pipeline.api.options import make_recipe

    recipe = make_recipe(recipe, max_shard_size=max_shard_size)
    run_one_stage("serialize", ui, existing_build(model, build_dir), recipe, machine)
