"""nf4 status"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nf4_pipeline.cli.help import CommandWithExamples, complete_model
from nf4_pipeline.cli.options import (
    ARTIFACTS,
    Ui,
    build_dir_option,
    existing_build,
    output_options,
    recipe_options,
)
from nf4_pipeline.cli.terminal import say

if TYPE_CHECKING:
    from nf4_pipeline.machine import Machine
    from nf4_pipeline.recipe import PartialRecipe


@click.command(
    "status",
    cls=CommandWithExamples,
    examples=(
        ("nf4 status", "All builds under artifacts/."),
        ("nf4 status sample --recipe my.toml", "What this recipe would have to do again."),
    ),
)
@click.argument("model", required=False, shell_complete=complete_model)
@build_dir_option
@recipe_options()
@output_options
def command(
    ui: Ui, recipe: PartialRecipe, machine: Machine, model: str | None, build_dir: Path | None
) -> None:
    """Say of each stage of a build whether it is done, stale or missing, and why.

    Without MODEL or --build-dir, all builds under artifacts/ are meant.
    """
    from nf4_pipeline.build_folder import find_builds
    from nf4_pipeline.progress import LOADING

    if model is None and build_dir is None:
        builds = find_builds(ARTIFACTS)
    else:
        builds = [existing_build(model, build_dir)]
    reporter = ui.reporter()
    with reporter.task(LOADING, None):
        from nf4_pipeline.job import states

    by_build = {str(build.root): states(build, recipe, machine, reporter) for build in builds}

    def show() -> None:
        if not by_build:
            say(f"No builds under {ARTIFACTS}/. Start one: nf4 build sample")
        for root, stages in by_build.items():
            say(root)
            for stage, state in stages.items():
                say(f"  {stage:<10} {state.status:<8} {state.why}")

    value = {
        root: {stage: {"status": s.status, "why": s.why} for stage, s in stages.items()}
        for root, stages in by_build.items()
    }
    ui.result(value, show)
