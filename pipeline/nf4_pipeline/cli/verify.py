"""nf4 verify"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nf4_pipeline.cli.options import (
    NamedPath,
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


@click.command("verify")
@click.argument("model", required=False)
@click.option(
    "--prompts",
    type=NamedPath(dir_okay=False),
    help='JSONL of {"prompt", "expect", "chat"}; wins over the recipe.',
)
@click.option(
    "--eval-text",
    type=NamedPath(dir_okay=False),
    help="Text on which both models are compared, instead of the one that comes with nf4.",
)
@click.option(
    "--eval-tokens",
    type=click.IntRange(min=2, max=10**9),
    help="Tokens of it, at most.  [default: 8192]",
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
@recipe_options
@output_options
def command(
    ui: Ui,
    recipe: PartialRecipe,
    machine: Machine,
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

    from nf4_pipeline.api.options import make_recipe
    from nf4_pipeline.cli.summary import show_checks, show_verdict
    from nf4_pipeline.recipe import parse_size

    recipe = make_recipe(recipe, prompts=prompts, eval_text=eval_text, eval_tokens=eval_tokens)
    if device_memory:
        machine = replace(machine, device_memory=parse_size(device_memory, "--device-memory"))
    build = existing_build(model, build_dir)
    record = run_one_stage("verify", ui, build, recipe, machine, against=against)
    verification = record.facts
    if not ui.as_json:
        (show_checks if ui.verbose else show_verdict)(verification)
    if verification.verdict != "pass":
        sys.exit(1)
