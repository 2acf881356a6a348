"""nf4 attest"""

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


@click.command("attest")
@click.argument("model", required=False)
@build_dir_option
@recipe_options
@output_options
def command(
    ui: Ui, recipe: PartialRecipe, machine: Machine, model: str | None, build_dir: Path | None
) -> None:
    """Write provenance.json (SLSA) and bom.cdx.json (CycloneDX) into a verified export.

    MODEL is what the build was started with; without it, the newest build is meant. `nf4 build`
    does this last.
    """
    run_one_stage("attest", ui, existing_build(model, build_dir), recipe, machine)
