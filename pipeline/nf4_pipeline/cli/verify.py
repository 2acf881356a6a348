"""nf4 verify"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nf4_pipeline.cli.help import CommandWithExamples, complete_model
from nf4_pipeline.cli.named_builds import named_build, other_artifact
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


@click.command(
    "verify",
    cls=CommandWithExamples,
    examples=(
        ("nf4 verify sample", "Measure again what lies there now."),
        (
            "nf4 verify sample --eval-text my.txt --against ../other/export",
            "On a text of yours, beside another artifact of the same source.",
        ),
    ),
)
@click.argument("model", required=False, shell_complete=complete_model)
@click.option(
    "--against",
    metavar="ARTIFACT",
    help="Another artifact of the same source (a tag or a path), compared on the same text.",
)
@build_dir_option
@recipe_options("verify")
@output_options
def command(
    ui: Ui,
    recipe: PartialRecipe,
    machine: Machine,
    model: str | None,
    against: str | None,
    build_dir: Path | str | None,
) -> None:
    """Reload the artifact in a fresh process and hold it against its 16-bit source.

    MODEL is what the build was started with, a tag such as "calibrated", or a path; without it,
    the build worked on last is meant. The 16-bit model is read block by block, so it need not fit
    the device. Exits 1 if the verdict is "fail".
    """
    from nf4_pipeline.cli.summary import show_checks, show_verdict

    build = named_build(
        ui, model, build_dir, newest=model is None, needs="serialize", after="serialize"
    )
    if against is not None:
        against = other_artifact(ui, against, build)
    record = run_one_stage("verify", ui, build, recipe, machine, against=against)
    verification = record.facts
    if not ui.as_json:
        (show_checks if ui.verbose else show_verdict)(verification)
    if verification.verdict != "pass":
        sys.exit(1)
