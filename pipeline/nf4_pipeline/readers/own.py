"""Our loader as a reader, in a process that holds its model anyway."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nf4_pipeline.readers.document import ReaderResult


def judge_own(
    version: str,
    layers: Sequence[str],
    expected: Iterable[str],
    lost: Sequence[str],
    logits: Path,
    *,
    promised: bool = True,
) -> ReaderResult:
    """The row of our loader.

    Args:
        version: of this package.
        layers: the 4-bit layers that it loaded.
        expected: those of the manifest.
        lost: names that it missed, or that it had no place for.
        logits: file that `write_logits` wrote; the others' logits are compared with it.
        promised: whether the card promises it.
    """
    wrong = names_wrong(layers, expected, lost)
    if not wrong and not np.isfinite(np.load(logits)).all():
        wrong = "its logits are not finite"
    return ReaderResult(
        name="nf4_pipeline",
        version=version,
        promised=promised,
        outcome="failed" if wrong else "passed",
        why=wrong or "loads, every name in its place; the others' logits are compared with its own",
        layers=len(layers),
        logits_distance=None,
    )


def names_wrong(layers: Sequence[str], expected: Iterable[str], lost: Sequence[str]) -> str:
    """What is wrong with the names that a reader found, or nothing."""
    odd = sorted(set(layers) ^ set(expected))
    if odd:
        which = "is not 4 bit" if odd[0] not in layers else "is 4 bit and should not be"
        return f"{odd[0]} {which}" + (f", and {len(odd) - 1} more" if len(odd) > 1 else "")
    if lost:
        return f"{len(lost)} names missing or unexpected, such as {lost[0]}"
    return ""
