"""nf4 batch FILE"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nf4_pipeline.cli.help import CommandWithExamples
from nf4_pipeline.cli.options import NamedPath, Ui, output_options
from nf4_pipeline.cli.terminal import say

if TYPE_CHECKING:
    from nf4_pipeline.batch.results import Result


@click.command(
    "batch",
    cls=CommandWithExamples,
    examples=(
        ("nf4 batch models.toml", "Every [[model]] of the file, one after the other."),
        (
            'nf4 batch models.toml --markdown "$GITHUB_STEP_SUMMARY"',
            "With the table for a job summary of GitHub, added to what stands there.",
        ),
    ),
)
@click.argument("file", type=NamedPath(dir_okay=False))
@click.option(
    "--markdown",
    type=NamedPath(dir_okay=False),
    help="Add the table at the end, as Markdown, to this file.",
)
@output_options
def command(ui: Ui, file: Path, markdown: Path | None) -> None:
    """Build many models and recipes, and say what came of each.

    FILE is TOML: a table [[model]] for each build, with model = "ORG/NAME" and any option of
    `nf4 build`, as in calibrate = "self"; what stands in [defaults] is for all of them. All are
    checked before the first begins. A build that fails does not end the others; what is done is
    not done again. Exits 1 unless all pass.
    """
    from nf4_pipeline.batch.queue import read_queue
    from nf4_pipeline.progress import LOADING

    jobs = read_queue(file)
    reporter = ui.reporter()
    with reporter.task(LOADING, None):
        from nf4_pipeline.batch.results import BatchResults, as_markdown
        from nf4_pipeline.batch.running import run_jobs

    done = BatchResults(results=tuple(run_jobs(jobs, reporter)))
    if markdown is not None:
        with markdown.open("a", encoding="utf-8") as summary:
            summary.write(f"{as_markdown(done.results)}\n")
    ui.result(done.to_json(), lambda: _show(done.results))
    if any(result.outcome == "not run" for result in done.results):
        sys.exit(130)
    if not done.all_passed:
        sys.exit(1)


def _show(results: Sequence[Result]) -> None:
    from nf4_pipeline.report.formatting import number, plain_size

    say()
    width = max(len(result.model) for result in results)
    for result in results:
        parts = [f"  {result.outcome:<7} {result.model:<{width}}"]
        if result.artifact_bytes is not None:
            parts.append(plain_size(result.artifact_bytes))
        if result.mean_kl is not None:
            parts.append(f"KL {number(result.mean_kl)}")
        if result.outcome != "not run":
            parts.append(f"{result.seconds:.1f} s")
        if result.options:
            parts.append(f"({result.options})")
        say("  ".join(parts))
        if where := result.error or result.build:
            say(f"          {where}")
    passed = sum(result.outcome == "pass" for result in results)
    say(f"  {passed} of {len(results)} passed")
