"""nf4 push"""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli.options import Ui, build_dir_option, existing_build, output_options


@click.command("push")
@click.argument("model", required=False)
@click.option("--repo-id", required=True, metavar="ORG/NAME", help="Where it would go.")
@click.option("--public/--private", default=False, help="Visibility of a new repo.")
@click.option("--dry-run", is_flag=True, help="List what would be uploaded; the only mode so far.")
@build_dir_option
@output_options
def command(
    ui: Ui, model: str | None, repo_id: str, public: bool, dry_run: bool, build_dir: Path | None
) -> None:
    """List exactly what a push of a verified export would upload.

    Uploading itself is not built yet, so --dry-run must be given.
    """
    from pipeline.errors import UsageError
    from pipeline.runtime.artifact import is_hub_id
    from pipeline.stages.push import plan_upload

    if not is_hub_id(repo_id):
        raise UsageError(f"--repo-id {repo_id}: expected ORG/NAME.")
    if not dry_run:
        raise UsageError(
            "Uploading is not built yet. `nf4 push --dry-run` lists what would be uploaded; the "
            "export folder itself can be uploaded with `hf upload`."
        )
    build = existing_build(model, build_dir)
    upload = plan_upload(build, repo_id, private=not public)

    def show() -> None:
        visibility = "private" if upload.private else "public"
        click.echo(f"would upload to {repo_id} ({visibility} if it has to be created):")
        for name, digest in upload.files.items():
            click.echo(f"  {digest.size:>14,}  {digest.sha256[:12]}  {name}")
        click.echo(f"  {sum(d.size for d in upload.files.values()):>14,}  bytes in all")

    ui.result(upload.as_json(), show)
