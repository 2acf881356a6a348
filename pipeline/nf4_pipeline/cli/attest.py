"""nf4 attest"""

from __future__ import annotations

from pathlib import Path

import click

from nf4_pipeline.cli.help import CommandWithExamples, complete_model
from nf4_pipeline.cli.options import (
    Ui,
    build_dir_option,
    existing_build,
    output_options,
    run_one_stage,
)


@click.command(
    "attest",
    cls=CommandWithExamples,
    examples=(
        ("nf4 attest sample", "After a build whose last stage was stopped."),
        ("nf4 attest --build-dir /data/my-build", "A build in a folder of its own."),
    ),
)
@click.argument("model", required=False, shell_complete=complete_model)
@build_dir_option
@output_options
def command(ui: Ui, model: str | None, build_dir: Path | None) -> None:
    """Write provenance.json (SLSA) and bom.cdx.json (CycloneDX) into a verified export.

    MODEL is what the build was started with; without it, the newest build is meant. `nf4 build`
    does this last.
    """
    from nf4_pipeline.api.options import make_machine, make_recipe

    build = existing_build(model, build_dir)
    run_one_stage("attest", ui, build, make_recipe(), make_machine())
