"""What all stages are, and how each of them leaves its record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from nf4_pipeline.build_folder import Build, Facts, Record, RecordKind
from nf4_pipeline.checkpoint.digest import FileDigest, FileStamp
from nf4_pipeline.recipe import RecipeTable
from nf4_pipeline.resource_usage import Usage, measured

F = TypeVar("F", bound=Facts)

Outcome = tuple[dict[str, FileDigest], F]
"""What a stage's work gives: its outputs, by their path in the build folder, and its facts."""


class Stage(Protocol):
    """A stage of a build, made once with what it needs."""

    @property
    def kind(self) -> RecordKind[Facts]:
        """Of the record that it leaves."""

    def key(self) -> str:
        """Hash of everything that shapes its outputs: with the same one, it need not run again."""

    def run(self) -> Record[Any]:
        """Does the work."""


def run_recorded(
    build: Build,
    kind: RecordKind[F],
    key: str,
    work: Callable[[], Outcome[F]],
    *,
    recipe: RecipeTable | None = None,
    before: Usage | None = None,
    inputs: Mapping[str, FileDigest] | None = None,
    stamps: Mapping[str, FileStamp] | None = None,
    child_peak: Callable[[F], int] = lambda facts: 0,
) -> Record[F]:
    """Runs a stage's work between forgetting its old record and writing the new one.

    Args:
        build: where.
        kind: of the record.
        key: of the record.
        work: does it.
        recipe: the stage's table, as plain values; None if it has none.
        before: what was spent before the key was known; it counts, too.
        inputs: the files that the facts are a verdict about, as `Record` has them.
        stamps: of outputs that were hashed earlier, as `Record` has them.
        child_peak: the peak memory of processes that the work started, from its facts.
    """
    build.forget(kind)
    with measured() as usage:
        outputs, facts = work()
    earlier = before or Usage()
    record = Record(
        kind,
        key,
        outputs,
        facts,
        earlier.seconds + usage.seconds,
        max(earlier.peak_memory, usage.peak_memory, child_peak(facts)),
        recipe=recipe or {},
        inputs=dict(inputs or {}),
        stamps=dict(stamps or {}),
    )
    build.write_record(record)
    return record
