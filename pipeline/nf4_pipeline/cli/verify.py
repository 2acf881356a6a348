"""nf4 verify"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nf4_pipeline.cli.options import (
    Ui,
    build_dir_option,
    output_options,
    run_one_stage,
    settings_options,
)

if TYPE_CHECKING:
    from nf4_pipeline.stages import Settings


@click.command("verify")
@click.argument("model", required=False)
@click.option(
    "--prompts",
    type=click.Path(dir_okay=False, path_type=Path),
    help='JSONL of {"prompt", "expect", "chat"}; wins over the recipe.',
)
@click.option(
    "--eval-text",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Text on which both models are compared, instead of the one that comes with nf4.",
)
@click.option(
    "--eval-tokens", type=click.IntRange(min=2), help="Tokens of it, at most.  [default: 8192]"
)
@click.option(
    "--against",
    metavar="ARTIFACT",
    help="Another artifact of the same source, compared on the same text.",
)
@click.option(
    "--device-memory", help='How much of the device may be used, such as "8GB".  [default: all]'
)
@build_dir_option
@settings_options
@output_options
def command(
    ui: Ui,
    settings: Settings,
    model: str | None,
    prompts: Path | None,
    eval_text: Path | None,
    eval_tokens: int | None,
    against: str | None,
    device_memory: str | None,
    build_dir: Path | None,
) -> None:
    """Reload the artifact in a fresh process and hold it against its 16-bit source.

    MODEL is what the build was started with; without it, the newest build is meant. The 16-bit
    model is read block by block, so it need not fit the device. Exits 1 if the verdict is "fail".
    """
    from dataclasses import replace

    from nf4_pipeline.cli.summary import show_checks
    from nf4_pipeline.recipe import parse_size
    from nf4_pipeline.verification.document import parse_verification

    recipe = settings.recipe.verify
    if prompts is not None:
        recipe = replace(recipe, prompts=str(prompts))
    if eval_text is not None:
        recipe = replace(recipe, eval_text=str(eval_text))
    if eval_tokens is not None:
        recipe = replace(recipe, eval_tokens=eval_tokens)
    settings = replace(
        settings,
        recipe=replace(settings.recipe, verify=recipe),
        against=against,
        device_memory=parse_size(device_memory, "--device-memory") if device_memory else 0,
    )
    record = run_one_stage("verify", ui, settings, model, build_dir)
    if not ui.as_json:
        show_checks(parse_verification(record.facts))
    if record.facts["verdict"] != "pass":
        sys.exit(1)
