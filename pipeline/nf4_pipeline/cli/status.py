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
    ui: Ui, recipe: PartialRecipe, machine: Machine, model: str | None, build_dir: Path | str | None
) -> None:
    """Say of each stage of a build whether it is done, stale or missing, and why.

    MODEL is what builds were started with (all of them are meant), a tag such as "calibrated", or a
    path. Without MODEL or --build-dir, all builds under artifacts/ are meant.
    """
    from nf4_pipeline.build_folder import Build
    from nf4_pipeline.build_folder.remote import shown_place
    from nf4_pipeline.builds import Use, find_builds, no_build, recipe_shown
    from nf4_pipeline.progress import LOADING

    builds = find_builds(model if build_dir is None else build_dir, ARTIFACTS, Use("status"))
    reporter = ui.reporter()
    with reporter.task(LOADING, None):
        from nf4_pipeline.job import states

    found = [(build, states(Build(build.root), recipe, machine, reporter)) for build in builds]

    def show() -> None:
        if not found:
            say(str(no_build(None, ARTIFACTS)))
        for build, stages in found:
            say(shown_place(build.root))
            if build.variant is not None and (changed := recipe_shown(build.variant)):
                say(f"  {'recipe':<10} {changed}")
            for stage, state in stages.items():
                say(f"  {stage:<10} {state.status:<8} {state.why}")

    value = {
        str(build.root): {stage: {"status": s.status, "why": s.why} for stage, s in stages.items()}
        for build, stages in found
    }
    ui.result(value, show)
