"""The stages. Each reads the records before it, does one thing, and writes its record last.

    download.py    a name -> a pinned, hashed checkpoint in source/
    quantize.py    source/ -> quantized/
    serialize.py   quantized/ -> export/: the artifact and its manifest
    verify.py      export/ against source/ -> verification.json, report, model card, the verdict
    attest.py      export/ -> provenance.json and bom.cdx.json in it
    push.py        export/ -> what would be, or is, on the Hub

`download` makes the build folder; the others are a `key(build, settings)` that says when they are
up to date, and a `run(build, settings, reporter)` that does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.engine.buffers import DEFAULT_BUDGET
from nf4_pipeline.recipe import TABLES, Recipe
from nf4_pipeline.resource_usage import Usage, measured


@dataclass(frozen=True)
class Settings:
    """What the user asked for, the same for every stage.

    Attributes:
        recipe: everything that shapes bytes and verdict.
        given: those of its tables that hold for an existing build, too; of the others it is known
            what the build was made with.
        device: "auto", "cpu", "cuda" or "cuda:N".
        require_gpu: verifying without a GPU is a failure.
        workers: threads that quantize; 0 for as many as keep the device busy.
        memory_budget: bytes for all buffers of the engine together.
        device_memory: bytes of the device that verifying may use; 0 for all that is free.
        against: an artifact of the same source that verify compares this one with; None for none.
    """

    recipe: Recipe = field(default_factory=Recipe)
    given: frozenset[str] = frozenset(TABLES)
    device: str = "auto"
    require_gpu: bool = False
    workers: int = 0
    memory_budget: int = DEFAULT_BUDGET
    device_memory: int = 0
    against: str | None = None


def recorded(
    build: Build,
    stage: str,
    key: str,
    work: Callable[[], tuple[dict[str, Any], dict[str, Any]]],
    *,
    recipe: dict[str, Any] | None = None,
    before: Usage | None = None,
    child_peak: Callable[[dict[str, Any]], int] = lambda facts: 0,
) -> Record:
    """Runs a stage's work between forgetting its old record and writing the new one.

    Args:
        build: where.
        stage: which.
        key: of the record.
        work: does it; returns the outputs (path -> digest) and the facts.
        recipe: its table, as plain values; None if it has none.
        before: what was spent before the key was known; it counts, too.
        child_peak: the peak memory of processes that the work started, from its facts.
    """
    build.forget(stage)
    with measured() as usage:
        outputs, facts = work()
    earlier = before or Usage()
    record = Record(
        stage,
        key,
        outputs,
        facts,
        earlier.seconds + usage.seconds,
        max(earlier.peak_memory, usage.peak_memory, child_peak(facts)),
        recipe=recipe or {},
    )
    build.write_record(record)
    return record
