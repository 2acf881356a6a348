"""nf4 sign ARTIFACT"""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from nf4_pipeline.cli.help import CommandWithExamples, complete_model
from nf4_pipeline.cli.named_builds import artifact_folder
from nf4_pipeline.cli.options import NamedPath, Ui, output_options, sigstore_options
from nf4_pipeline.cli.terminal import say
from nf4_pipeline.errors import UsageError


@click.command(
    "sign",
    cls=CommandWithExamples,
    examples=(
        ("nf4 sign artifacts/NAME --key my-key.pem", "The signature goes into its export."),
        (
            "NF4_KEY_PASSWORD=… nf4 sign artifacts/NAME --key my-key.pem",
            "With a key that has a password.",
        ),
        ("nf4 sign artifacts/NAME --keyless", "In a CI job, as this job."),
    ),
)
@click.argument("artifact", shell_complete=complete_model)
@click.option(
    "--key", type=NamedPath(dir_okay=False), help="PEM file of an elliptic curve private key."
)
@click.option(
    "--password",
    envvar="NF4_KEY_PASSWORD",
    help="Of the key, if it has one; better in NF4_KEY_PASSWORD, which other users cannot list.",
)
@click.option("--keyless", is_flag=True, help="Sign as this CI job, or as who a token says.")
@click.option(
    "--identity-token",
    envvar="SIGSTORE_ID_TOKEN",
    help="Who signs, where CI does not say; better in SIGSTORE_ID_TOKEN.",
)
@sigstore_options
@output_options
def command(
    ui: Ui,
    artifact: str,
    key: Path | None,
    password: str | None,
    keyless: bool,
    identity_token: str | None,
    trust_config: Path | None,
    staging: bool,
) -> None:
    """Sign every file of ARTIFACT (OpenSSF model signing).

    With a key of yours and offline, or with --keyless as an identity that Sigstore certifies: a
    workflow of GitHub or GitLab; the artifact's hashes and that identity become public in its log.
    The signature goes into the artifact as model.sig; sign last, when all else is in it. Make a key
    with `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`.
    """
    from nf4_pipeline.provenance.keyless import Instance
    from nf4_pipeline.provenance.signing import SIGNATURE_FILE, sign, sign_keyless

    if keyless == (key is not None):
        raise UsageError(
            "Name how to sign: either --key FILE or --keyless. To make a key: test -e "
            "my-key.pem || openssl ecparam -name prime256v1 -genkey -noout -out my-key.pem ; "
            f"then: nf4 sign {shlex.quote(artifact)} --key my-key.pem"
        )
    if key is not None:
        if trust_config or staging:
            raise UsageError("--trust-config and --staging are of --keyless; --key asks nobody.")
        signature = sign(artifact_folder(ui, artifact), key, password)
        ui.result({"signature": str(signature)}, lambda: say(f"signed: {signature}"))
        return
    folder = artifact_folder(ui, artifact)
    signer = sign_keyless(folder, identity_token, Instance(trust_config, staging))
    value = {
        "signature": str(folder / SIGNATURE_FILE),
        "identity": signer.identity,
        "issuer": signer.issuer,
    }

    def show() -> None:
        say(f"signed: {value['signature']}")
        say(f"check with --identity {signer.identity} --issuer {signer.issuer}")

    ui.result(value, show)
