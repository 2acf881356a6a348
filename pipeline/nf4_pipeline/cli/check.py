"""nf4 check ARTIFACT"""

from __future__ import annotations

from pathlib import Path

import click

from nf4_pipeline.cli.named_builds import artifact_folder
from nf4_pipeline.cli.options import NamedPath, Ui, output_options
from nf4_pipeline.cli.terminal import say


@click.command("check")
@click.argument("artifact")
@click.option(
    "--key",
    required=True,
    type=NamedPath(dir_okay=False),
    help="PEM file of the signer's public key.",
)
@output_options
def command(ui: Ui, artifact: str, key: Path) -> None:
    """Check that ARTIFACT holds exactly what was signed with a key.

    A file that changed, is missing, or was added is refused, with exit code 1. The public key must
    come from the signer, not from the artifact.
    """
    from nf4_pipeline.provenance.signing import check

    folder = artifact_folder(ui, artifact)
    count = check(folder, key)
    value = {"artifact": str(folder), "signed": True, "files": count}
    ui.result(value, lambda: say(f"signed with that key: {count} files, none else"))
