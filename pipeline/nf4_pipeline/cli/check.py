"""nf4 check ARTIFACT"""

from __future__ import annotations

from pathlib import Path

import click

from nf4_pipeline.cli.help import CommandWithExamples, complete_model
from nf4_pipeline.cli.named_builds import artifact_folder
from nf4_pipeline.cli.options import NamedPath, Ui, output_options
from nf4_pipeline.cli.terminal import say


@click.command(
    "check",
    cls=CommandWithExamples,
    examples=(
        (
            "nf4 check DOWNLOADED --key signer-public.pem",
            "A downloaded artifact, with the key that its maker gave you.",
        ),
        ("nf4 check artifacts/NAME --key public.pem --json", "A build of yours, for a program."),
    ),
)
@click.argument("artifact", shell_complete=complete_model)
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
