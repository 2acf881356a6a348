"""nf4 attest"""

from __future__ import annotations

from pathlib import Path

import click

from nf4_pipeline.cli.help import CommandWithExamples, complete_model
from nf4_pipeline.cli.named_builds import named_build
from nf4_pipeline.cli.options import (
    NamedPath,
    Ui,
    build_dir_option,
    output_options,
    run_one_stage,
)


@click.command(
    "attest",
    cls=CommandWithExamples,
    examples=(
        ("nf4 attest sample", "After a build whose last stage was stopped."),
        ("nf4 attest --build-dir /data/my-build", "A build in a folder of its own."),
    ),
)
@click.argument("model", required=False, shell_complete=complete_model)
@click.option(
    "--repo-id",
    metavar="ORG/NAME",
    help="The Hub repo that the card's snippets load from; only needed before signing.",
)
@click.option(
    "--rebuilt",
    nargs=2,
    type=(NamedPath(dir_okay=False), str),
    metavar="SUMMARY URL",
    help="A summary by nf4 rebuild that passed (.vsa.json), and its address, which the card gives.",
)
@build_dir_option
@output_options
def command(
    ui: Ui,
    model: str | None,
    repo_id: str | None,
    rebuilt: tuple[Path, str] | None,
    build_dir: Path | str | None,
) -> None:
    """Write the model card, provenance.json (SLSA) and bom.cdx.json (CycloneDX) into the export.

    MODEL is what the build was started with, a tag such as "calibrated", or a path; without it,
    the build worked on last is meant. `nf4 build` does this last, and `nf4 push` again with the
    name of the repo. The card says "Verified reproducible" only with a summary of this very
    artifact, which --rebuilt names; `nf4 push` keeps it.
    """
    from nf4_pipeline.api.options import check_repo_id, make_machine, make_recipe

    check_repo_id(repo_id)
    build = named_build(
        ui, model, build_dir, newest=model is None, needs="serialize", after="verify"
    )
    summary = None
    if rebuilt is not None:
        from nf4_pipeline.checkpoint.digest import digest_file
        from nf4_pipeline.manifest.read import MANIFEST_FILE
        from nf4_pipeline.provenance.summary import read_summary

        summary = read_summary(*rebuilt, digest_file(build.export / MANIFEST_FILE))
    run_one_stage(
        "attest", ui, build, make_recipe(), make_machine(), repo_id=repo_id, rebuilt=summary
    )
