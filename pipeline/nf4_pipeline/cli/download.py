"""nf4 download MODEL"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from nf4_pipeline.cli.help import CommandWithExamples
from nf4_pipeline.cli.options import Ui, download_options, output_options
from nf4_pipeline.cli.terminal import program, say

if TYPE_CHECKING:
    from nf4_pipeline.stages.download_request import DownloadRequest


@click.command(
    "download",
    cls=CommandWithExamples,
    examples=(
        (
            "nf4 download tiiuae/falcon-7b-instruct --revision main",
            "A model of the Hub, pinned to the commit that main is now.",
        ),
        ("nf4 download ./my-model", "A local folder: hashed and looked at, nothing is copied."),
    ),
)
@download_options
@output_options
def command(ui: Ui, request: DownloadRequest) -> None:
    """Pin MODEL (a Hub id, a local folder, or "sample"), fetch it, and check every file's hash."""
    from nf4_pipeline.checkpoint.digest import digests_json
    from nf4_pipeline.progress import LOADING

    reporter = ui.reporter()
    with reporter.task(LOADING, None):
        from nf4_pipeline.job import run_download
        from nf4_pipeline.records import source_files

    build, record, _ = run_download(request, reporter)
    facts, files = record.facts, source_files(record)
    value = {
        "build": str(build.root),
        **facts.identity.to_json(),
        "files": digests_json(files),
        "bytes": record.total_bytes,
    }

    def show() -> None:
        say(
            f"{facts.repo} at {facts.pinned}: {len(record.outputs)} files, "
            f"{record.total_bytes:,} bytes"
        )
        if facts.streamed:
            staying = sum(digest.size for digest in facts.streamed.values())
            say(f"        {len(facts.streamed)} files of weights, {staying:,} bytes, stay there")
        place = shlex.quote(build.shown)
        say(f"build:  {place}")
        named = shlex.quote(request.model) if request.build_dir is None else f"--build-dir {place}"
        say(f"next:   {program()} quantize {named}")

    ui.result(value, show)
