"""nf4 verify"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.options import (
    Ui,
    build_dir_option,
    output_options,
    run_one_stage,
    settings_options,
)

if TYPE_CHECKING:
    from pipeline.stages import Settings


@click.command("verify")
@click.argument("model", required=False)
@click.option(
    "--prompts",
    type=click.Path(dir_okay=False, path_type=Path),
    help='JSONL of {"prompt", "expect", "chat"}; wins over the recipe.',
)
@build_dir_option
@settings_options
@output_options
def command(
    ui: Ui,
    settings: Settings,
    model: str | None,
    prompts: Path | None,
    build_dir: Path | None,
) -> None:
    """Reload the artifact in a fresh process and hold it against its 16-bit source.

    MODEL is what the build was started with; without it, the newest build is meant. Exits 1 if the
    verdict is "fail".
    """
    from dataclasses import replace

    from pipeline.cli.summary import show_checks

    if prompts is not None:
        verify = replace(settings.recipe.verify, prompts=str(prompts))
        settings = replace(settings, recipe=replace(settings.recipe, verify=verify))
    record = run_one_stage("verify", ui, settings, model, build_dir)
    if not ui.as_json:
        show_checks(record.facts)
    if record.facts["verdict"] != "pass":
        sys.exit(1)
