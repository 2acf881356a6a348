"""What a finished stage leaves: its record, in memory and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

from nf4_pipeline.checkpoint.atomic import write_json
from nf4_pipeline.checkpoint.digest import FileDigest, FileStamp, digests_json
from nf4_pipeline.checkpoint.plain_file import read_plain
from nf4_pipeline.recipe import RecipeTable

RECORD_VERSION: Final = 1
_LARGEST: Final = 256 * 2**20  # bytes; 100,000 tensors take 50 MB


class Facts(Protocol):
    """What later stages and people want to know of a finished stage; JSON in its record."""

    def to_json(self) -> dict[str, Any]: ...


F = TypeVar("F", bound=Facts)
F_co = TypeVar("F_co", bound=Facts, covariant=True)


@dataclass(frozen=True)
class RecordKind(Generic[F_co]):
    """The record of one stage (all of them: `records.py`).

    Attributes:
        stage: the stage's name, as the command's.
        parse: JSON -> its facts; not compared, since one that another process sent is another.
        file: its name in records/, but for the ending; that of the stage without it.
        owns: the folder whose files are this stage's, and of nobody before it; none if empty.
    """

    stage: str
    parse: Callable[[Any], F_co] = field(compare=False)
    file: str = ""
    owns: str = ""


@dataclass(frozen=True)
class Record(Generic[F_co]):
    """What a finished stage leaves.

    Attributes:
        kind: whose record it is.
        key: hash of everything that shapes the outputs.
        outputs: path relative to the build folder -> digest.
        facts: what later stages and people want to know.
        seconds: wall-clock time of the work.
        peak_memory: bytes.
        finished: when, in UTC, as ISO 8601; empty until it is written.
        recipe: the table of the recipe that is named for the stage; empty if there is none.
        inputs: path relative to the build folder -> digest of what was found there, of the files
            that the facts are a verdict about; empty for a stage that judges nothing.
        stamps: of outputs, from before they were hashed; an output without one is as it is when the
            record is written.
    """

    kind: RecordKind[F_co]
    key: str
    outputs: dict[str, FileDigest]
    facts: F_co
    seconds: float
    peak_memory: int
    finished: str = ""
    recipe: RecipeTable = field(default_factory=dict)
    inputs: dict[str, FileDigest] = field(default_factory=dict)
    stamps: dict[str, FileStamp] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Of all outputs."""
        return sum(digest.size for digest in self.outputs.values())

    def outputs_in(self, folder: str) -> dict[str, FileDigest]:
        """The outputs in one folder of the build, by their path in it.

        Args:
            folder: its name, such as "export".
        """
        return _inside(folder, self.outputs)

    def inputs_in(self, folder: str) -> dict[str, FileDigest]:
        """The files in one folder of the build that were judged, by their path in it."""
        return _inside(folder, self.inputs)


def _inside(folder: str, files: dict[str, FileDigest]) -> dict[str, FileDigest]:
    prefix = f"{folder}/"
    return {
        path.removeprefix(prefix): digest
        for path, digest in files.items()
        if path.startswith(prefix)
    }


def read_record(path: Path, kind: RecordKind[F]) -> Record[F] | None:
    """The record in a file, or None if there is none that can be read.

    Args:
        path: where it would be.
        kind: whose record it must be.
    """
    try:
        value = json.loads(read_plain(path, _LARGEST))
        if value["version"] != RECORD_VERSION or value["stage"] != kind.stage:
            return None
        outputs = _digests(value["outputs"])
        stamps = {
            name: FileStamp(entry["size"], entry["mtime_ns"], entry["ctime_ns"], entry["inode"])
            for name, entry in value["outputs"].items()
            if {"mtime_ns", "ctime_ns", "inode"} <= entry.keys()
        }
        return Record(
            kind,
            value["key"],
            outputs,
            kind.parse(value["facts"]),
            float(value["seconds"]),
            int(value["peak_memory_bytes"]),
            str(value["finished"]),
            dict(value.get("recipe", {})),
            _digests(value.get("inputs", {})),
            stamps,
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return None
    except RecursionError:
        return None


def write_record(path: Path, record: Record[Facts]) -> None:
    """Writes a record, complete or not at all.

    Args:
        path: where to.
        record: what it says; with the stamps of all outputs that stand here.
    """
    write_json(path, record_json(record))


def record_json(record: Record[Facts]) -> dict[str, Any]:
    """What the file of a record says."""
    return {
        "version": RECORD_VERSION,
        "stage": record.kind.stage,
        "key": record.key,
        "outputs": {
            name: {
                **(record.stamps[name].to_json() if name in record.stamps else {}),
                **digest.to_json(),
            }
            for name, digest in sorted(record.outputs.items())
        },
        "inputs": digests_json(record.inputs),
        "seconds": round(record.seconds, 3),
        "peak_memory_bytes": record.peak_memory,
        "finished": record.finished or now(),
        "recipe": record.recipe,
        "facts": record.facts.to_json(),
    }


def now() -> str:
    """The time in UTC, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _digests(value: Mapping[str, Mapping[str, int | str]]) -> dict[str, FileDigest]:
    return {
        name: FileDigest(int(entry["size"]), str(entry["sha256"])) for name, entry in value.items()
    }
