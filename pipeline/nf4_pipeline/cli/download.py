"""nf4 download MODEL"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from nf4_pipeline.cli.options import (
    ARTIFACTS,
    Ui,
    build_dir_option,
    output_options,
    source_options,
    weights_options,
)


@click.command("download")
@click.argument("model")
@source_options
@weights_options
@build_dir_option
@output_options
def command(
    ui: Ui,
    model: str,
    source: dict[str, Any],
    build_dir: Path | None,
    allow_unused: tuple[str, ...],
    strip_prefix: str | None,
) -> None:
    """Pin MODEL (a Hub id, a local folder, or "sample"), fetch it, and check every file's hash."""
    from nf4_pipeline.build_folder import digests_json
    from nf4_pipeline.job import run_download
    from nf4_pipeline.recipe import QuantizeRecipe
    from nf4_pipeline.stages import download

    recipe = QuantizeRecipe(allow_unused=allow_unused, strip_prefix=strip_prefix or "")
    build, record, _ = run_download(
        model,
        ARTIFACTS,
        ui.reporter(),
        build_dir=build_dir,
        allow_unused=recipe.allow_unused,
        strip_prefix=recipe.strip_prefix,
        **source,
    )
    total = sum(digest.size for digest in record.outputs.values())
    value = {
        "build": str(build.root),
        "repo": record.facts["repo"],
        "commit": record.facts["commit"],
        "content_sha256": record.facts["content_sha256"],
        "files": digests_json(download.recorded_files(record)),
        "bytes": total,
    }

    def show() -> None:
        pinned = record.facts["commit"] or f"content {record.facts['content_sha256'][:12]}"
        click.echo(
            f"{record.facts['repo']} at {pinned}: {len(record.outputs)} files, {total:,} bytes"
        )
        place = shlex.quote(str(build.root))
        click.echo(f"build:  {place}")
        click.echo(f"next:   nf4 quantize --build-dir {place}")

    ui.result(value, show)
