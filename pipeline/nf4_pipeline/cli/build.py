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
    from nf4_pipeline.progress import Reporter
    from nf4_pipeline.recipe import PartialRecipe
    from nf4_pipeline.stages.download_request import DownloadRequest


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
        (
            "nf4 build Qwen/Qwen3-8B --dry-run",
            "What it would fetch, write and take, from a few hundred kilobytes of headers.",
        ),
        (
            "nf4 build tiiuae/falcon-180B --stream-source",
            "A model larger than the disk: only the result lies there.",
        ),
    ),
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print sizes, disk, memory and time; fetch no weights and build nothing. Exits 1 if a "
    "disk is too small.",
)
@click.option(
    "--stream-output",
    metavar="ORG/NAME",
    help="Send finished files to this Hub repo while others are made; nobody sees them until one "
    "commit names them, after the verdict. A repo that has to be made is private. With "
    "--stream-source, what the Hub has received is kept on no disk here.",
)
@download_options
@recipe_options("quantize", "serialize", "verify")
@output_options
def command(
    ui: Ui,
    request: DownloadRequest,
    recipe: PartialRecipe,
    machine: Machine,
    dry_run: bool,
    stream_output: str | None,
) -> None:
    """Download, quantize, serialize, verify, attest MODEL: a Hub id, a local folder, or "sample".

    What is done and still valid is not done again. Exits 1 if the verdict is "fail".
    """
    from nf4_pipeline.api.options import make_target
    from nf4_pipeline.progress import LOADING

    target = None if stream_output is None else make_target(stream_output)
    reporter = ui.reporter()
    if dry_run:
        _show_forecast(ui, request, recipe, machine, reporter, sends=target is not None)
        return
    with reporter.task(LOADING, None):
        from nf4_pipeline.cli.summary import Summary, show_summary
        from nf4_pipeline.job import run_build

    build, results = run_build(request, recipe.recipe, machine, reporter, target)
    summary = Summary.of(build, results)
    ui.result(summary.to_json(), lambda: show_summary(summary, verbose=ui.verbose))
    if summary.verification.verdict != "pass":
        sys.exit(1)


def _show_forecast(
    ui: Ui,
    request: DownloadRequest,
    recipe: PartialRecipe,
    machine: Machine,
    reporter: Reporter,
    *,
    sends: bool,
) -> None:
    from nf4_pipeline.progress import LOADING

    with reporter.task(LOADING, None):
        from nf4_pipeline.cli.forecast import show_forecast
        from nf4_pipeline.job import plan_build

    found = plan_build(request, recipe.recipe, machine, reporter, sends=sends)
    ui.result(found.to_json(), lambda: show_forecast(found, verbose=ui.verbose))
    if not found.fits:
        sys.exit(1)
