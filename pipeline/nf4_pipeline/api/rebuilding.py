"""Artifacts that others published, derived again by a Python program, as `nf4 rebuild` does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from nf4_pipeline.api.interrupts import interruptible
from nf4_pipeline.api.options import PathName, make_machine
from nf4_pipeline.checkpoint.atomic import check_can_be_made
from nf4_pipeline.checkpoint.model_name import at_revision, check_hub_id, model_path
from nf4_pipeline.checkpoint.named_path import named_path
from nf4_pipeline.errors import UsageError
from nf4_pipeline.machine import DEFAULT_MEMORY_BUDGET
from nf4_pipeline.progress import ProgressCallback, reporting_to
from nf4_pipeline.recipe import parse_size

if TYPE_CHECKING:
    from nf4_pipeline.rebuilding.rebuild import RebuildRequest
    from nf4_pipeline.rebuilding.results import RebuildDocument
    from nf4_pipeline.rebuilding.writing import Writer

MOST_DOWNLOADED = "100GB"
_URI = re.compile(r"[a-z][a-z0-9+.-]*:[!#-;=?-\[\]^_a-z{|}~]{1,1000}", re.I)


def rebuild(
    artifacts: PathName | Sequence[PathName],
    *,
    output: PathName | None = None,
    verifier: str | None = None,
    work_dir: PathName | None = None,
    keep: bool = False,
    max_download: str | int = MOST_DOWNLOADED,
    device: str = "auto",
    workers: int = 0,
    memory_budget: str | int = DEFAULT_MEMORY_BUDGET,
    trust_config: PathName | None = None,
    progress: ProgressCallback | None = None,
) -> RebuildDocument:
    """Fetches artifacts, derives each again from its source, and gives each a verdict.

    What goes wrong with one is its verdict, and the next one follows.

    Args:
        artifacts: repos of the Hub, as ORG/NAME or ORG/NAME@REVISION, or folders.
        output: where summaries, badges, the table and results.json go; None for nowhere.
        verifier: who says so, in summaries, as a URI.
        work_dir: where what is fetched goes; None for a temporary folder.
        keep: leave it there for the next time.
        max_download: bytes that one artifact and its source may have together.
        device: where calibrated codes are chosen again; "auto" for the kind that a manifest says.
        workers: threads; 0 for as many as keep the processor busy.
        memory_budget: bytes of the engine's buffers.
        trust_config: of the Sigstore that certifies the workflows which provenance names; None for
            the public one.
        progress: called with each `ProgressEvent`.

    Raises:
        UsageError: a name or an option means nothing.
        AccessError: a folder cannot be made or written to.
        BuildError: another rebuilder works in that folder.
    """
    request = make_rebuild(
        [artifacts] if isinstance(artifacts, str | PathLike) else artifacts,
        work_dir=work_dir,
        keep=keep,
        max_download=max_download,
        device=device,
        workers=workers,
        memory_budget=memory_budget,
        trust_config=trust_config,
    )
    writer = make_writer(verifier, output)
    from nf4_pipeline.rebuilding.rebuild import rebuild

    with interruptible(), reporting_to(progress) as reporter:
        results = rebuild(request, reporter)
    if output is not None:
        writer.write(results, Path(fspath(output)))
    return writer.document(results)


def make_rebuild(
    artifacts: Sequence[PathName],
    listed: Sequence[str] = (),
    *,
    work_dir: PathName | None = None,
    keep: bool = False,
    max_download: str | int = MOST_DOWNLOADED,
    device: str = "auto",
    workers: int = 0,
    memory_budget: str | int = DEFAULT_MEMORY_BUDGET,
    trust_config: PathName | None = None,
) -> RebuildRequest:
    """What is to be derived again; `RebuildRequest` says what each means.

    One of `listed` that can be no artifact gets a verdict like the others: it must not end a run.

    Raises:
        UsageError: a name or an option means nothing.
    """
    from nf4_pipeline.rebuilding.rebuild import RebuildRequest

    names = [fspath(name) for name in artifacts]
    for name in names:
        if not model_path(name).is_dir():
            check_hub_id((at_revision(name) or (name,))[0])
    if keep and work_dir is None:
        raise UsageError("--keep keeps what lies in --work-dir: name one.")
    trust = None if trust_config is None else named_path(fspath(trust_config))
    if trust is not None:
        from nf4_pipeline.provenance.keyless import Instance

        Instance(trust).check()
    return RebuildRequest(
        [*names, *listed],
        None if work_dir is None else named_path(fspath(work_dir)),
        keep,
        parse_size(str(max_download), "--max-download"),
        make_machine(device=device, workers=workers, memory_budget=memory_budget),
        trust,
    )


def make_writer(verifier: str | None, output: PathName | None) -> Writer:
    """What writes the results, once it is sure that they can be written.

    Raises:
        UsageError: the verifier is no URI.
        AccessError: the folder cannot be made.
    """
    from nf4_pipeline.provenance.summary import VERIFIER
    from nf4_pipeline.rebuilding.writing import Writer

    if verifier is not None and not _URI.fullmatch(verifier):
        raise UsageError(
            f"--verifier {verifier[:80]!r}: expected a URI, such as the address of the workflow "
            "or the page of who vouches for it."
        )
    if output is not None:
        check_can_be_made(Path(fspath(output)))
    return Writer(verifier or VERIFIER)
