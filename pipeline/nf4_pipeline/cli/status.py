"""nf4 status"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nf4_pipeline.cli.options import (
    ARTIFACTS,
    Ui,
    build_dir_option,
    existing_build,
    output_options,
    settings_options,
)

if TYPE_CHECKING:
    from nf4_pipeline.stages import Settings


@click.command("status")
@click.argument("model", required=False)
@build_dir_option
@settings_options
@output_options
def command(ui: Ui, settings: Settings, model: str | None, build_dir: Path | None) -> None:
    """Say of each stage of a build whether it is done, stale or missing, and why.

    Without MODEL or --build-dir, all builds under artifacts/ are meant.
    """
    from nf4_pipeline.build_folder import find_builds
    from nf4_pipeline.job import states

    if model is None and build_dir is None:
        builds = find_builds(ARTIFACTS)
    else:
        builds = [existing_build(model, build_dir)]
    found = {str(build.root): states(build, settings, ui.reporter()) for build in builds}

    def show() -> None:
        if not found:
            click.echo(f"No builds under {ARTIFACTS}/. Start one: nf4 build sample")
        for root, stages in found.items():
            click.echo(root)
            for stage, state in stages.items():
                click.echo(f"  {stage:<10} {state.status:<8} {state.why}")

    value = {
        root: {stage: {"status": s.status, "why": s.why} for stage, s in stages.items()}
        for root, stages in found.items()
    }
    ui.result(value, show)
