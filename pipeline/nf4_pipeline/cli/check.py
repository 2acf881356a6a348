"""nf4 check ARTIFACT"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from nf4_pipeline.cli.help import CommandWithExamples, complete_model
from nf4_pipeline.cli.named_builds import artifact_folder
from nf4_pipeline.cli.options import NamedPath, Ui, output_options, sigstore_options
from nf4_pipeline.cli.terminal import say
from nf4_pipeline.errors import UsageError


@click.command(
    "check",
    cls=CommandWithExamples,
    examples=(
        (
            "nf4 check DOWNLOADED --key signer-public.pem",
            "A downloaded artifact, with the key that its maker gave you.",
        ),
        ("nf4 check artifacts/NAME --key public.pem --json", "A build of yours, for a program."),
        (
            "nf4 check DOWNLOADED --identity $WORKFLOW --issuer $ISSUER",
            "Signed by a workflow, without a key; `nf4 sign --keyless` says both.",
        ),
    ),
)
@click.argument("artifact", shell_complete=complete_model)
@click.option("--key", type=NamedPath(dir_okay=False), help="PEM file of the signer's public key.")
@click.option("--identity", metavar="ID", help="Who must have signed without a key, in full.")
@click.option("--issuer", metavar="URL", help="Who vouches for that identity, in full.")
@sigstore_options
@output_options
def command(
    ui: Ui,
    artifact: str,
    key: Path | None,
    identity: str | None,
    issuer: str | None,
    trust_config: Path | None,
    staging: bool,
) -> None:
    """Check that ARTIFACT holds exactly what was signed, with a key or by an identity.

    A file that changed, is missing, or was added is refused, with exit code 1. The public key, or
    the identity and its issuer, must come from the signer, not from the artifact.
    """
    from nf4_pipeline.provenance.keyless import Instance, Signer
    from nf4_pipeline.provenance.signing import check, check_identity

    named = identity is not None or issuer is not None
    if named == (key is not None):
        raise UsageError(
            "Name who must have signed: --key FILE, or --identity and --issuer. For "
            f"example: nf4 check {shlex.quote(artifact)} --key signer.pub"
        )
    value: dict[str, Any] = {"signed": True}
    if key is not None:
        if trust_config or staging:
            raise UsageError("--trust-config and --staging are of --identity; --key asks nobody.")
        folder = artifact_folder(ui, artifact)
        count, whom = check(folder, key), "with that key"
    else:
        if identity is None or issuer is None:
            missing = "--identity" if identity is None else "--issuer"
            raise UsageError(
                f"{missing} is missing: an identity is one only together with who vouches for it."
            )
        folder = artifact_folder(ui, artifact)
        instance = Instance(trust_config, staging)
        count, whom = check_identity(folder, Signer(identity, issuer), instance), f"by {identity}"
        value |= {"identity": identity, "issuer": issuer}
    value = {"artifact": str(folder), **value, "files": count}
    ui.result(value, lambda: say(f"signed {whom}: {count} files, none else"))
