"""nf4 serialize"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nf4_pipeline.cli.help import CommandWithExamples, complete_model
from nf4_pipeline.cli.named_builds import build_for
from nf4_pipeline.cli.options import (
    Ui,
    build_dir_option,
    output_options,
    recipe_options,
    replace_option,
    run_one_stage,
)

if TYPE_CHECKING:
    from nf4_pipeline.machine import Machine
    from nf4_pipeline.recipe import PartialRecipe


@click.command(
    "serialize",
    cls=CommandWithExamples,
    examples=(
        ("nf4 serialize", "The newest build."),
        ("nf4 serialize sample --max-shard-size 500MB", "In smaller files."),
    ),
)
@click.argument("model", required=False, shell_complete=complete_model)
@build_dir_option
@replace_option
@recipe_options("serialize")
@output_options
def command(
    ui: Ui,
    recipe: PartialRecipe,
    machine: Machine,
    model: str | None,
    build_dir: Path | str | None,
    replaces: bool,
) -> None:
    """Write the publishable folder of a quantized build, with its manifest.

    MODEL is what the build was started with, a tag such as "calibrated", or a path; without it,
    the build worked on last is meant. Of a model, each recipe has a build of its own.
    """
    build = build_for(ui, "serialize", model, build_dir, recipe)
    run_one_stage("serialize", ui, build, recipe, machine, replaces=replaces)
