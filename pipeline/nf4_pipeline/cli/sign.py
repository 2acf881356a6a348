"""nf4 sign ARTIFACT"""

from __future__ import annotations

from pathlib import Path

import click

from nf4_pipeline.cli.help import CommandWithExamples, complete_model
from nf4_pipeline.cli.named_builds import artifact_folder
from nf4_pipeline.cli.options import NamedPath, Ui, output_options
from nf4_pipeline.cli.terminal import say


@click.command(
    "sign",
    cls=CommandWithExamples,
    examples=(
        ("nf4 sign artifacts/NAME --key my-key.pem", "The signature goes into its export."),
        (
            "NF4_KEY_PASSWORD=… nf4 sign artifacts/NAME --key my-key.pem",
            "With a key that has a password.",
        ),
    ),
)
@click.argument("artifact", shell_complete=complete_model)
@click.option(
    "--key",
    required=True,
    type=NamedPath(dir_okay=False),
    help="PEM file of an elliptic curve private key. Make one: test -e my-key.pem || openssl "
    "ecparam -name prime256v1 -genkey -noout -out my-key.pem",
)
@click.option(
    "--password",
    envvar="NF4_KEY_PASSWORD",
    help="Of the key, if it has one; better in NF4_KEY_PASSWORD, which other users cannot list.",
)
@output_options
def command(ui: Ui, artifact: str, key: Path, password: str | None) -> None:
    """Sign every file of ARTIFACT with a key of yours (OpenSSF model signing, offline).

    The signature goes into the artifact as model.sig; sign last, when all else is in it. Make a
    key with `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`.
    """
    from nf4_pipeline.provenance.signing import sign

    signature = sign(artifact_folder(ui, artifact), key, password)
    ui.result({"signature": str(signature)}, lambda: say(f"signed: {signature}"))
