"""nf4 attest"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nf4_pipeline.cli.named_builds import named_build
from nf4_pipeline.cli.options import (
    Ui,
    build_dir_option,
    output_options,
    recipe_options,
    run_one_stage,
)

if TYPE_CHECKING:
    from nf4_pipeline.machine import Machine
    from nf4_pipeline.recipe import PartialRecipe


@click.command("attest")
@click.argument("model", required=False)
@click.option(
    "--repo-id",
    metavar="ORG/NAME",
    help="The Hub repo that the card's snippets load from; only needed before signing.",
)
@build_dir_option
@recipe_options
@output_options
def command(
    ui: Ui,
    recipe: PartialRecipe,
    machine: Machine,
    model: str | None,
    repo_id: str | None,
    build_dir: Path | None,
) -> None:
    """Write the model card, provenance.json (SLSA) and bom.cdx.json (CycloneDX) into the export.

    MODEL is what the build was started with, a tag such as "calibrated", or a path; without it,
    the build worked on last is meant. `nf4 build` does this last, and `nf4 push` again with the
    name of the repo.
    """
    from nf4_pipeline.api.options import check_repo_id

    check_repo_id(repo_id)
    build = named_build(ui, model, build_dir, newest=model is None, needs="serialize")
    run_one_stage("attest", ui, build, recipe, machine, repo_id=repo_id)
