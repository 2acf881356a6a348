"""What a reader found, and what follows for the verdict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from nf4_pipeline.documents import Document
from nf4_pipeline.fidelity.verdict import Check

Outcome = Literal["passed", "loaded only", "failed", "not tried"]

_SAID: Final = ("passed", "failed")  # outcomes that a check shows by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderResult(Document):
    """One row of `readers` in verification.json.

    Attributes:
        name: of the reader: "nf4_pipeline", "transformers", "numpy" or "peft".
        version: of it; None if it is not there.
        promised: whether the card promises it, so that the verdict depends on it.
        outcome: how it went; "loaded only" if this machine cannot compute what it would.
        why: what it did or why it did not, in words for people.
        layers: how many 4-bit layers it found; None if it did not come so far.
        logits_distance: sqrt(sum (found - ours)^2 / sum ours^2) over the logits of a few tokens;
            None if they were not compared.
    """

    name: str
    version: str | None
    promised: bool
    outcome: Outcome
    why: str
    layers: int | None
    logits_distance: float | None


def reader_checks(results: Iterable[ReaderResult]) -> list[Check]:
    """A check for each reader that the card promises.

    It fails unless the reader passed, or could do no more than load what it should.
    """
    return [
        Check(
            f"read by {titled(result)}",
            result.outcome in ("passed", "loaded only"),
            result.why if result.outcome in _SAID else f"{result.outcome}: {result.why}",
            "what our loader reads" if result.name != "nf4_pipeline" else "what was built",
        )
        for result in results
        if result.promised
    ]


def titled(result: ReaderResult) -> str:
    """The reader's name and version."""
    return f"{result.name} {result.version}" if result.version else result.name
