"""The build folder: where each stage leaves its files, and the record that says it is done.

    artifacts/<slug>/
      source/        the pinned checkpoint: links to where its files are
      quantized/     one safetensors per source shard, each complete or absent
      export/        the publishable folder
      records/       one small JSON per finished stage
      .lock          held by the process that works here

A record holds the stage's key, every output with its size and sha256, what the next stages need to
know, and what the work took. It is written last. A stage is done if its record has the key that it
would have now, and its outputs still hash as recorded; a record that cannot be read counts as none.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

from nf4_pipeline.checkpoint.atomic import (
    make_folder,
    recover_folder,
    remove_leftovers,
    sync_folder,
    write_json,
)
from nf4_pipeline.checkpoint.digest import FileDigest, digest_file
from nf4_pipeline.errors import BuildError
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.runtime.artifact import build_roots

RECORD_VERSION: Final = 1


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
        parse: JSON -> its facts.
    """

    stage: str
    parse: Callable[[Any], F_co]


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
    """

    kind: RecordKind[F_co]
    key: str
    outputs: dict[str, FileDigest]
    facts: F_co
    seconds: float
    peak_memory: int
    finished: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Of all outputs."""
        return sum(digest.size for digest in self.outputs.values())

    def outputs_in(self, folder: str) -> dict[str, FileDigest]:
        """The outputs in one folder of the build, by their path in it.

        Args:
            folder: its name, such as "export".
        """
        prefix = f"{folder}/"
        return {
            path.removeprefix(prefix): digest
            for path, digest in self.outputs.items()
            if path.startswith(prefix)
        }


@dataclass(frozen=True)
class State:
    """Whether a stage is done, and if not, why."""

    status: Literal["done", "stale", "missing"]
    why: str


class Build:
    """A build folder. Creating the object touches nothing on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def quantized(self) -> Path:
        return self.root / "quantized"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def calibration(self) -> Path:
        """Where quantize keeps the tokens that it calibrates on, and its choices."""
        return self.root / "calibration"

    def _record_path(self, kind: RecordKind[Facts]) -> Path:
        return self.root / "records" / f"{kind.stage}.json"

    def record(self, kind: RecordKind[F]) -> Record[F] | None:
        """The record of a stage, or None if there is none that can be read."""
        try:
            value = json.loads(self._record_path(kind).read_text("utf-8"))
            if value["version"] != RECORD_VERSION or value["stage"] != kind.stage:
                return None
            outputs = {
                path: FileDigest(int(entry["size"]), str(entry["sha256"]))
                for path, entry in value["outputs"].items()
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
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def need(self, kind: RecordKind[F]) -> Record[F]:
        """The record of a stage that must be done.

        Raises:
            BuildError: the stage has no record that can be read.
        """
        record = self.record(kind)
        if record is None:
            raise BuildError(
                f"{self.root} has no finished `{kind.stage}` stage. Run `nf4 {kind.stage}` on it "
                "first, or `nf4 build` for all stages."
            )
        return record

    def check_inputs(self, kind: RecordKind[Facts]) -> None:
        """Refuses to build on outputs of a stage that changed since it wrote them.

        A file with the recorded size and time counts as unchanged, as for git and make; any other
        is hashed.

        Raises:
            BuildError: the stage has no record, or a file that it left is gone or has other bytes.
        """
        record = self.need(kind)
        times = json.loads(self._record_path(kind).read_text("utf-8"))["outputs"]
        for name, expected in record.outputs.items():
            path = self.root / name
            if not path.is_file():
                raise BuildError(
                    f"{path} is gone, which `{kind.stage}` left there. Run `nf4 {kind.stage}` "
                    "again."
                )
            now = path.stat()
            unchanged = (now.st_size, now.st_mtime_ns) == (
                expected.size,
                times[name].get("mtime_ns"),
            )
            if not unchanged and digest_file(path) != expected:
                raise BuildError(
                    f"{path} changed since `{kind.stage}` recorded it (sha256 "
                    f"{expected.sha256[:12]}…). Run `nf4 {kind.stage}` again."
                )

    def write_record(self, record: Record[Facts]) -> None:
        """Writes a record; the last thing that a stage does."""
        write_json(
            self._record_path(record.kind),
            {
                "version": RECORD_VERSION,
                "stage": record.kind.stage,
                "key": record.key,
                "outputs": {
                    path: {**digest.to_json(), "mtime_ns": (self.root / path).stat().st_mtime_ns}
                    for path, digest in sorted(record.outputs.items())
                },
                "seconds": round(record.seconds, 3),
                "peak_memory_bytes": record.peak_memory,
                "finished": record.finished or datetime.now(UTC).isoformat(timespec="seconds"),
                "recipe": record.recipe,
                "facts": record.facts.to_json(),
            },
        )

    def forget(self, kind: RecordKind[Facts]) -> None:
        """Deletes a stage's record, before its outputs change."""
        path = self._record_path(kind)
        if path.exists():
            path.unlink()
            sync_folder(path.parent)

    def state(self, kind: RecordKind[Facts], key: str, reporter: Reporter = SILENT) -> State:
        """Whether a stage with this key is done; hashes its outputs to know."""
        record = self.record(kind)
        if record is None:
            return State("missing", "not run yet")
        if record.key != key:
            return State("stale", "its inputs, its recipe or this program changed since")
        with reporter.task(f"check {kind.stage}", record.total_bytes) as task:
            for name, expected in record.outputs.items():
                path = self.root / name
                if not path.is_file():
                    return State("stale", f"{name} is gone")
                if path.stat().st_size != expected.size or digest_file(path, task) != expected:
                    return State("stale", f"{name} is not what the stage wrote")
        return State("done", "outputs hash as recorded")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the build folder for this process; the lock of a dead process does not count.

        What a dead process left half done is deleted.

        Raises:
            BuildError: another live process holds this build folder.
        """
        make_folder(self.root)
        descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                raise BuildError(
                    f"{self.root} is in use by another nf4 process (pid {owner}). "
                    "Wait for it to end, or name another --build-dir."
                ) from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            recover_folder(self.export)
            for folder in (self.root / "records", self.quantized, self.export):
                remove_leftovers(folder)
            yield
        finally:
            os.close(descriptor)


def find_builds(artifacts: Path) -> list[Build]:
    """All builds under a folder, the one worked on last first."""
    return [Build(root) for root in build_roots(artifacts)]
