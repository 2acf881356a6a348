"""nf4 build MODEL"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from nf4_pipeline.cli.help import CommandWithExamples
from nf4_pipeline.cli.options import (
    Ui,
    download_options,
    output_options,
    recipe_options,
)

if TYPE_CHECKING:
    from nf4_pipeline.machine import Machine
    from nf4_pipeline.recipe import PartialRecipe
    from nf4_pipeline.stages.find_source import DownloadRequest


@click.command(
    "build",
    cls=CommandWithExamples,
    examples=(
        (
            "nf4 build sample",
            "A small model that comes along: no GPU, no network, 15 seconds.",
        ),
        (
            "nf4 build tiiuae/falcon-7b-instruct --calibrate self --extra-bytes 5%",
            "A model of the Hub; its most sensitive layers stay in 16 bit, for 5 % more bytes.",
        ),
    ),
)
@download_options
@recipe_options("quantize", "serialize", "verify")
@output_options
def command(ui: Ui, request: DownloadRequest, recipe: PartialRecipe, machine: Machine) -> None:
    """Download, quantize, serialize, verify, attest MODEL: a Hub id, a local folder, or "sample".

    What is done and still valid is not done again. Exits 1 if the verdict is "fail".
    """
    from nf4_pipeline.progress import LOADING

    reporter = ui.reporter()
    with reporter.task(LOADING, None):
        from nf4_pipeline.cli.summary import Summary, show_summary
        from nf4_pipeline.job import run_build

    build, results = run_build(request, recipe.recipe, machine, reporter)
    summary = Summary.of(build, results)
    ui.result(summary.to_json(), lambda: show_summary(summary, verbose=ui.verbose))
    if summary.verification.verdict != "pass":
        sys.exit(1)
