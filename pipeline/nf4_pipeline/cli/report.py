"""nf4 report ARTIFACT"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from nf4_pipeline.cli.help import CommandWithExamples, complete_model
from nf4_pipeline.cli.named_builds import artifact_folder
from nf4_pipeline.cli.options import NamedPath, Ui, WholeNumber, output_options
from nf4_pipeline.cli.terminal import say

if TYPE_CHECKING:
    from nf4_pipeline.ci.report import CiReport

_GITHUB_FILES: Final = ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")
_GITLAB_FILES: Final = ("nf4-summary.md", "nf4-checks.xml", "nf4.env")
_LONGEST_LOG: Final = 2**20  # bytes of its end


@click.command(
    "report",
    cls=CommandWithExamples,
    examples=(
        ("nf4 report artifacts/NAME", "Sizes, fidelity and checks, as Markdown."),
        (
            "nf4 report artifacts/NAME --format github",
            "In a step of GitHub Actions: a job summary, outputs, annotations.",
        ),
    ),
)
@click.argument("artifact", required=False, shell_complete=complete_model)
@click.option(
    "--plan",
    type=NamedPath(dir_okay=False),
    help="What `nf4 build --dry-run --json` printed, instead of an artifact.",
)
@click.option(
    "--parts",
    default=1,
    type=WholeNumber(4, 1, 256),
    metavar="N",
    help="With --plan: among how many jobs quantizing is divided.",
)
@click.option(
    "--format",
    "kind",
    default="markdown",
    type=click.Choice(["markdown", "github", "gitlab"]),
    help="markdown on stdout; github: into the files that GITHUB_OUTPUT and GITHUB_STEP_SUMMARY "
    "name, annotations on stdout; gitlab: nf4-summary.md, nf4-checks.xml (JUnit) and nf4.env here. "
    " [default: markdown]",
)
@click.option(
    "--log",
    type=NamedPath(dir_okay=False),
    help="What the build wrote on stderr: says why there is no artifact or plan, if there is none.",
)
@click.option(
    "--report-url", metavar="URL", help="Where report.html can be downloaded; it is linked to."
)
@output_options
def command(
    ui: Ui,
    artifact: str | None,
    plan: Path | None,
    parts: int,
    kind: str,
    log: Path | None,
    report_url: str | None,
) -> None:
    """Say what came of a build in the words of a CI system: summary, outputs, annotations.

    ARTIFACT is as for `nf4 inspect`. What was measured is reported; nothing is measured again, and
    a verdict "fail" is no failure of this command.
    """
    from nf4_pipeline.errors import UsageError

    if (artifact is None) == (plan is None):
        raise UsageError("Name an ARTIFACT, or a --plan instead: nf4 report artifacts/NAME")
    missing = [name for name in _GITHUB_FILES if kind == "github" and not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} are not set: --format github is for a step of GitHub "
            "Actions. Elsewhere, --format markdown prints the summary."
        )
    if plan is not None:
        report = _of_plan(plan, parts, log)
    else:
        assert artifact is not None
        report = _of_artifact(ui, artifact, log, report_url)
    if kind == "github":
        _write_github(report)
    elif kind == "gitlab":
        _write_gitlab(report)
    ui.result(report.to_json(), lambda: _show(report, kind))


def _of_plan(path: Path, parts: int, log: Path | None) -> CiReport:
    from nf4_pipeline.checkpoint.source import read_json
    from nf4_pipeline.ci.report import report_of_failure, report_of_plan
    from nf4_pipeline.documents import DocumentError
    from nf4_pipeline.errors import CheckpointError, UsageError
    from nf4_pipeline.stages.forecast import Forecast

    try:
        plan = Forecast.from_json(read_json(path, finite=True))
    except (CheckpointError, DocumentError) as error:
        if log is not None:
            return report_of_failure(_end_of(log))
        raise UsageError(
            f"{path} is no plan of a build ({error}). Make one: nf4 build MODEL --dry-run --json "
            f">{path}"
        ) from error
    return report_of_plan(plan, parts)


def _of_artifact(ui: Ui, name: str, log: Path | None, report_url: str | None) -> CiReport:
    from nf4_pipeline.api.artifact import Artifact
    from nf4_pipeline.build_folder import Build
    from nf4_pipeline.ci.report import report_of_artifact, report_of_failure
    from nf4_pipeline.errors import ArtifactError, BuildError
    from nf4_pipeline.records import PUSH

    try:
        artifact = Artifact.open(artifact_folder(ui, name, newest=True))
    except (ArtifactError, BuildError):
        if log is None:
            raise
        return report_of_failure(_end_of(log))
    build_dir = artifact.build_dir
    record = None if build_dir is None else Build(build_dir).record(PUSH)
    return report_of_artifact(
        artifact.manifest,
        artifact.verification,
        folder=str(artifact.path),
        pushed=None if record is None else record.facts,
        report_url=report_url,
    )


def _end_of(log: Path) -> str:
    """The end of a log; nothing if there is none, as when not even the first step ran."""
    try:
        raw = log.read_bytes()
    except OSError:
        return ""
    return raw[-_LONGEST_LOG:].decode("utf-8", errors="replace")


def _write_github(report: CiReport) -> None:
    from nf4_pipeline.ci.github import output_lines, step_summary

    texts = (output_lines(report.outputs), step_summary(report.markdown))
    for name, text in zip(_GITHUB_FILES, texts, strict=True):
        with Path(os.environ[name]).open("a", encoding="utf-8") as file:
            file.write(text)


def _write_gitlab(report: CiReport) -> None:
    from nf4_pipeline.ci.gitlab import junit, variables

    texts = (report.markdown, junit(report.checks), variables(report.outputs))
    for name, text in zip(_GITLAB_FILES, texts, strict=True):
        Path(name).write_text(text, encoding="utf-8")


def _show(report: CiReport, kind: str) -> None:
    from nf4_pipeline.ci.github import annotation_commands

    if kind == "github":
        for line in annotation_commands(report.annotations):
            say(line)
    elif kind == "gitlab":
        for annotation in report.annotations:
            say(f"{annotation.level}: {annotation.title}: {annotation.message}")
    else:
        say(report.markdown.rstrip("\n"), lines=True, limit=len(report.markdown))
