"""The five stages. Each reads the records before it, does one thing, and writes its record last.

    download.py    a name -> a pinned, hashed checkpoint in source/
    quantize.py    source/ -> quantized/
    serialize.py   quantized/ -> export/: the artifact and its manifest
    verify.py      export/ against source/ -> verification.json, the model card, the verdict
    push.py        export/ -> what would be, or is, on the Hub

`download` makes the build folder; the others are a `key(build, settings)` that says when they are
up to date, and a `run(build, settings, reporter)` that does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline.build import Build, Record
from pipeline.measure import measured
from pipeline.recipe import Recipe


@dataclass(frozen=True)
class Settings:
    """What the user asked for, the same for every stage.

    Attributes:
        recipe: everything that shapes bytes and verdict.
        device: "auto", "cpu", "cuda" or "cuda:N".
        require_gpu: verifying without a GPU is a failure.
        workers: threads that quantize; 0 for as many as there are processors.
    """

    recipe: Recipe = field(default_factory=Recipe)
    device: str = "auto"
    require_gpu: bool = False
    workers: int = 0


def recorded(
    build: Build, stage: str, key: str, work: Callable[[], tuple[dict[str, Any], dict[str, Any]]]
) -> Record:
    """Runs a stage's work between forgetting its old record and writing the new one.

    Args:
        build: where.
        stage: which.
        key: of the record.
        work: does it; returns the outputs (path -> digest) and the facts.
    """
    build.forget(stage)
    with measured() as usage:
        outputs, facts = work()
    record = Record(stage, key, outputs, facts, usage.seconds, usage.peak_memory)
    build.write_record(record)
    return record
