"""nf4 push"""

from __future__ import annotations

import os
import sys
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nf4_pipeline.cli.help import CommandWithExamples, complete_model
from nf4_pipeline.cli.named_builds import named_build
from nf4_pipeline.cli.options import Command, Ui, build_dir_option, output_options
from nf4_pipeline.cli.terminal import let_bars_through, say

if TYPE_CHECKING:
    from nf4_pipeline.records import PushFacts
    from nf4_pipeline.stages.push import Upload


def _client_bars(command: Command) -> Command:
    """Lets the Hub client show how far an upload is, where somebody watches.

    Only it knows, whichever way the bytes go; it reads the variable once, when it is imported.
    """

    @wraps(command)
    def wrapped(quiet: bool, **values: Any) -> Any:
        if sys.stderr.isatty() and not quiet:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
            let_bars_through()
        return command(quiet=quiet, **values)

    return wrapped


@click.command(
    "push",
    cls=CommandWithExamples,
    examples=(
        (
            "nf4 push sample --repo-id me/sample-nf4 --dry-run",
            "List files, sizes and card; the Hub is not asked.",
        ),
        (
            "nf4 push sample --repo-id me/sample-nf4",
            "Publish it, in a private repo if there is none yet.",
        ),
    ),
)
@click.argument("model", required=False, shell_complete=complete_model)
@click.option("--repo-id", required=True, metavar="ORG/NAME", help="The Hub repo to publish to.")
@click.option(
    "--public/--private",
    default=None,
    help="Visibility of the repo if it has to be created.  [default: --private]",
)
@click.option("--create-pr", is_flag=True, help="Propose the change as a pull request.")
@click.option("--force", is_flag=True, help="Also over what somebody else pushed meanwhile.")
@click.option(
    "--allow-unverified",
    is_flag=True,
    help='Also if the verdict is "fail"; the card on the Hub will say so.',
)
@click.option(
    "--dry-run", is_flag=True, help="List files, sizes, target and card; the Hub is not asked."
)
@build_dir_option
@_client_bars
@output_options
def command(
    ui: Ui,
    model: str | None,
    repo_id: str,
    public: bool | None,
    create_pr: bool,
    force: bool,
    allow_unverified: bool,
    dry_run: bool,
    build_dir: Path | str | None,
) -> None:
    """Publish a verified export to the Hub in one commit, and prove what the Hub holds.

    MODEL is as it was given to `nf4 build`, a tag such as "calibrated", or a path; it may be left
    out where there is one build. Running it again with nothing changed commits nothing.

    The token comes from HF_TOKEN or `hf auth login`. A CI job that has neither exchanges its
    identity for a token of the repo, if the repo lists it under Trusted Publishers; where
    HF_OIDC_RESOURCE names the repo, that goes first. Which it was is said.
    """
    from nf4_pipeline.api.options import make_target
    from nf4_pipeline.stages.push import Push

    private = None if public is None else not public
    target = make_target(repo_id, private=private, create_pr=create_pr, force=force)
    build = named_build(ui, model, build_dir, needs="recipe", after="verify")
    push = Push(build, target, ui.reporter(), allow_unverified)
    if dry_run:
        upload = push.plan()
        ui.result(upload.document.to_json(), lambda: _show_plan(upload))
    else:
        facts = push.run().facts
        ui.result(facts.to_json(), lambda: _show_push(facts))


def _show_plan(upload: Upload) -> None:
    target = upload.target
    visibility = "public" if target.private is False else "private"
    how = " as a pull request" if target.pull_request else ""
    say(f"would upload to {target.repo_id}{how} ({visibility} if it has to be created):")
    for name, digest in upload.files.items():
        say(f"  {digest.size:>14,}  {digest.sha256[:12]}  {name}")
    say(f"  {upload.total_bytes:>14,}  bytes in {len(upload.files)} files")
    say(f"verdict: {upload.verdict}; the Hub was not asked. Its card, README.md, would be:")
    for line in upload.card.splitlines():
        say(f"  | {line}".rstrip())


def _show_push(facts: PushFacts) -> None:
    visibility = "private" if facts.private else "public"
    new = ", new" if facts.created else ""
    done = "pushed to" if facts.committed else "nothing to do:"
    say(f"{done} {facts.repo_id} ({visibility}{new}), {facts.branch}")
    if facts.pull_request:
        say(f"pull request  {facts.pull_request_url}")
    made = "" if facts.committed else "  (was there; nothing was committed)"
    say(f"commit        {facts.url}{made}")
    say(
        f"proof         the Hub lists the expected checksum for all {len(facts.files)} files, "
        f"{facts.total_bytes:,} bytes"
    )
    others = [path for path in facts.proof.others if path != ".gitattributes"]
    if others:
        say(f"left alone    {', '.join(others[:4])}{', …' if others[4:] else ''}")
    if facts.allow_unverified:
        say('warning       its verdict is not "pass", and the card on the Hub says so')
