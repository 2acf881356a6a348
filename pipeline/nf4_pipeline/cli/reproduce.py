"""nf4 reproduce ARTIFACT"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nf4_pipeline.cli.help import CommandWithExamples, complete_model
from nf4_pipeline.cli.named_builds import artifact_folder
from nf4_pipeline.cli.options import THREADS, NamedPath, Ui, output_options
from nf4_pipeline.cli.terminal import say
from nf4_pipeline.errors import NOT_CHECKED

if TYPE_CHECKING:
    from nf4_pipeline.reproduce.reproduce import Reproduction


@click.command(
    "reproduce",
    cls=CommandWithExamples,
    examples=(
        ("nf4 reproduce artifacts/NAME", "From the commit that its manifest pins."),
        (
            "nf4 reproduce DOWNLOADED --source ./my-model",
            "From a copy of the source on this machine.",
        ),
    ),
)
@click.argument("artifact", shell_complete=complete_model)
@click.option(
    "--source",
    type=NamedPath(file_okay=False),
    help="The folder that holds the source.  [default: the commit that the manifest pins]",
)
@click.option(
    "--device",
    default="auto",
    metavar="auto|cpu|cuda[:N]",
    help="Where calibrated codes are chosen again.  [default: the kind that the manifest says]",
)
@click.option("--workers", default=0, type=THREADS, help="Threads.  [default: CPUs + 1]")
@click.option(
    "--memory-budget", default="256MiB", show_default=True, help="For the engine's buffers."
)
@output_options
def command(
    ui: Ui,
    artifact: str,
    source: Path | None,
    device: str,
    workers: int,
    memory_budget: str,
) -> None:
    """Derive ARTIFACT again from its pinned source, and compare every byte that it must hold.

    ARTIFACT is the path of a downloaded artifact, an export or a build, or a model or a tag of a
    build. The work is done on the CPU and nothing of the artifact is written.

    Nothing that the manifest says is believed: the source's files are hashed, and its repo and
    commit are held against what a Hub lists there, or against the Hub cache. Exits 1 if anything
    differs; 3 if every byte is derived again, and nobody could be asked for repo and commit.

    Calibrated codes are chosen again from the tokens in calibration.json, on the kind of device on
    which they were chosen. On another model of GPU or processor some of them may differ, since the
    model's activations are what the libraries beneath compute there.
    """
    from nf4_pipeline.api.options import make_machine
    from nf4_pipeline.progress import LOADING

    machine = make_machine(device=device, workers=workers, memory_budget=memory_budget)
    folder = artifact_folder(ui, artifact)
    reporter = ui.reporter()
    with reporter.task(LOADING, None):
        from nf4_pipeline.reproduce.reproduce import reproduce

    result = reproduce(folder, source, reporter, machine)
    ui.result(result.document.to_json(), lambda: _show(result))
    if result.differences:
        sys.exit(1)
    if result.origin.is_open:
        sys.exit(NOT_CHECKED)


def _show(result: Reproduction) -> None:
    source = result.source
    if result.origin.confirmed_by is not None:
        pinned = source.commit or f"content {source.content_sha256[:12]}"
        say(f"source: {source.repo} at {pinned}")
        say(f"confirmed by: {result.origin.confirmed_by}")
    else:
        pinned = source.repo if source.commit is None else f"{source.repo} at {source.commit}"
        say(f"source: content {source.content_sha256[:12]}, {len(source.files)} files")
        say(f"not checked: that it is {pinned} ({result.origin.not_checked})")
    for difference in result.differences:
        place = ""
        if difference.tensor is not None:
            place += f", first in {difference.tensor}"
        if difference.offset is not None:
            place += f" at byte {difference.offset:,}"
        say(f"differs: {difference.file} {difference.what}{place}")
    if result.not_derived:
        say(f"not derived: {', '.join(result.not_derived)} (not made from the source)")
    if result.differences and result.calibrated_on:
        say(
            f"calibrated: again, on {result.calibrated_on}. Codes hang on how a device computes: "
            "on another model of GPU or processor than the artifact's some may differ."
        )
    say(f"reproduced: {result.equal} of {result.files} files")
