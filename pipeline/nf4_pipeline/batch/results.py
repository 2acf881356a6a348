"""What came of the jobs of a batch: JSON, and a table in Markdown. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nf4_pipeline.documents import Document, optional
from nf4_pipeline.report.formatting import number, percent, plain_size
from nf4_pipeline.report.markdown import code, in_cell, table


@dataclass(frozen=True, kw_only=True)
class Result(Document):
    """What came of one build.

    Attributes:
        model: as the file names it.
        options: what the file says beside it.
        outcome: the verdict; "error" if there is none, "not run" if the batch was stopped before.
        error: why there is no verdict; None if there is one.
        build: the build folder; None if there is none.
        seconds: what was done now took.
        original_bytes: of all tensors of the source.
        artifact_bytes: of those of the artifact.
        mean_kl: nats per token from the 16-bit model; None if it was not measured.
        agreement: how often the next token is the same; None if it was not measured.
    """

    model: str
    options: str
    outcome: Literal["pass", "fail", "error", "not run"]
    error: str | None = optional()
    build: str | None = optional()
    seconds: float = 0.0
    original_bytes: int | None = optional()
    artifact_bytes: int | None = optional()
    mean_kl: float | None = optional()
    agreement: float | None = optional()


@dataclass(frozen=True, kw_only=True)
class BatchResults(Document):
    """What came of a batch, as `nf4 batch --json` says it."""

    results: tuple[Result, ...]

    @property
    def all_passed(self) -> bool:
        return all(result.outcome == "pass" for result in self.results)


def as_markdown(results: Sequence[Result]) -> str:
    """A table of all builds, for a job summary or a page."""
    head = ("model", "options", "outcome", "size", "of 16 bit", "KL", "same token", "time", "where")
    return table(head, [_row(result) for result in results])


def _row(result: Result) -> tuple[str, ...]:
    size = ratio = ""
    if result.artifact_bytes is not None and result.original_bytes:
        size = plain_size(result.artifact_bytes)
        ratio = f"{result.artifact_bytes / result.original_bytes:.1%}"
    return (
        code(result.model),
        in_cell(result.options),
        result.outcome,
        size,
        ratio,
        "" if result.mean_kl is None else number(result.mean_kl),
        "" if result.agreement is None else percent(result.agreement),
        f"{result.seconds:.0f} s" if result.outcome != "not run" else "",
        code(result.build) if result.build else in_cell(result.error or ""),
    )
