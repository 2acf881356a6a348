"""nf4 rebuild REPO..."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nf4_pipeline.checkpoint.plain_file import read_text, why_unreadable
from nf4_pipeline.cli.help import CommandWithExamples
from nf4_pipeline.cli.options import THREADS, NamedPath, Ui, output_options
from nf4_pipeline.cli.terminal import say
from nf4_pipeline.errors import NOT_CHECKED, UsageError

if TYPE_CHECKING:
    from nf4_pipeline.rebuilding.results import RebuildResult

_LARGEST_LIST = 2**20  # bytes
_MOST_SHOWN = 10  # differences of one artifact


@click.command(
    "rebuild",
    cls=CommandWithExamples,
    examples=(
        ("nf4 rebuild ORG/NAME", "An artifact that somebody published, at its newest commit."),
        (
            "nf4 rebuild --list repos.txt --output rebuilt",
            "Many of them; summaries, badges and a table go into a folder.",
        ),
    ),
)
@click.argument("artifacts", nargs=-1, metavar="[REPO[@REVISION] | FOLDER]...")
@click.option(
    "--list",
    "listed",
    type=NamedPath(dir_okay=False),
    help="A file that names more of them, one a line; # begins a comment.",
)
@click.option(
    "--output",
    type=NamedPath(file_okay=False),
    help="Where summaries (VSA), badges, table and results.json go.  [default: nowhere]",
)
@click.option(
    "--verifier",
    metavar="URI",
    help="Who says so, in summaries.  [default: this program, run by somebody]",
)
@click.option(
    "--work-dir",
    type=NamedPath(file_okay=False),
    help="Where what is fetched goes, in a folder nf4-rebuild.  [default: a temporary folder]",
)
@click.option("--keep", is_flag=True, help="Leave it in --work-dir for the next time.")
@click.option(
    "--max-download",
    default="100GB",
    metavar="SIZE",
    show_default=True,
    help="What an artifact and its source may have together.",
)
@click.option(
    "--device",
    default="auto",
    metavar="auto|cpu|cuda[:N]",
    help="Where calibrated codes are chosen again.  [default: the kind that a manifest says]",
)
@click.option("--workers", default=0, type=THREADS, help="Threads.  [default: CPUs + 1]")
@click.option(
    "--memory-budget", default="256MiB", show_default=True, help="For the engine's buffers."
)
@click.option(
    "--trust-config",
    type=NamedPath(dir_okay=False),
    help="Of the Sigstore that certifies workflows.  [default: the public one]",
)
@output_options
def command(
    ui: Ui,
    artifacts: tuple[str, ...],
    listed: Path | None,
    output: Path | None,
    verifier: str | None,
    work_dir: Path | None,
    keep: bool,
    max_download: str,
    device: str,
    workers: int,
    memory_budget: str,
    trust_config: Path | None,
) -> None:
    """Fetch published artifacts, derive each again from its source, and give each a verdict.

    PASSED: every byte that source and recipe decide was derived again, and nothing else is there
    but known documents, which claim nothing else. FAILED: something differs, and it is named.
    NOT_CHECKED: nobody can tell here, as without the source, or without the kind of device on which
    codes were calibrated.

    Exits 0 if all PASSED, 1 if one FAILED, 3 if none failed and one could not be checked. Nothing
    that an artifact says is believed, and nothing outside the work folder and --output is written.
    """
    from nf4_pipeline.api.rebuilding import make_rebuild, make_writer
    from nf4_pipeline.progress import LOADING

    if not artifacts and listed is None:
        raise UsageError("No artifact is named. Name repos of the Hub, or folders, or a --list.")
    request = make_rebuild(
        artifacts,
        _names_in(listed) if listed is not None else (),
        work_dir=work_dir,
        keep=keep,
        max_download=max_download,
        device=device,
        workers=workers,
        memory_budget=memory_budget,
        trust_config=trust_config,
    )
    writer = make_writer(verifier, output)
    reporter = ui.reporter()
    with reporter.task(LOADING, None):
        from nf4_pipeline.rebuilding.rebuild import rebuild

    def show(result: RebuildResult) -> None:
        if not ui.as_json:
            _show(result)

    results = rebuild(request, reporter, lambda each: show(each.result))
    document = writer.document(results)
    if output is not None:
        writer.write(results, output)
    verdicts: list[str] = [each.result.verdict for each in results]
    ui.result(document.to_json(), lambda: _show_end(verdicts, output))
    if "FAILED" in verdicts:
        sys.exit(1)
    if "NOT_CHECKED" in verdicts:
        sys.exit(NOT_CHECKED)


def _names_in(path: Path) -> list[str]:
    """The artifacts that a file names."""
    try:
        lines = read_text(path, _LARGEST_LIST).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--list {path}: it cannot be read: {why_unreadable(error)}.") from error
    return [name for line in lines if (name := re.sub(r"(^|\s)#.*", "", line).strip())]


def _show(result: RebuildResult) -> None:
    commit = f" at {result.commit[:12]}" if result.commit else ""
    say(f"{result.verdict}  {result.artifact}{commit}: {result.why}")
    for difference in result.differences[:_MOST_SHOWN]:
        place = "" if difference.tensor is None else f", first in {difference.tensor}"
        if difference.offset is not None:
            place += f" at byte {difference.offset:,}"
        say(f"  differs: {difference.file} {difference.what}{place}")
    if more := len(result.differences) - _MOST_SHOWN:
        if more > 0:
            say(f"  and {more} more")
    for note in result.notes:
        say(f"  note: {note}")


def _show_end(verdicts: list[str], output: Path | None) -> None:
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("PASSED", "FAILED", "NOT_CHECKED"))
    say(f"{len(verdicts)} artifacts: {counts}")
    if output is not None:
        say(f"written to: {output}")
