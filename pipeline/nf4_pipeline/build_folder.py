"""The build folder: where each stage leaves its files, and the record that says it is done.

    artifacts/<slug>/
      source/        the pinned checkpoint: links to where its files are
      quantized/     one safetensors per source shard, each complete or absent
      export/        the publishable folder
      records/       one small JSON per finished stage
      .lock          held by the process that works here

A record holds the stage's key, every output with its size, sha256 and stamp (times and inode),
what the next stages need to know, and what the work took; that of a stage that judges holds the
files that it judged, too. It is written last. A stage is done if its record has the key that it
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
from nf4_pipeline.checkpoint.digest import (
    FileDigest,
    FileStamp,
    digest_file,
    digests_json,
)
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
    recipe: dict[str, Any] = field(default_factory=dict)
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


@dataclass(frozen=True)
class State:
    """Whether a stage is done, and if not, why."""

    status: Literal["done", "stale", "missing"]
    why: str


@dataclass(frozen=True)
class Inputs:
    """The outputs of a stage, as another one found them before it read them.

    Attributes:
        root: the build folder.
        stage: the one that left them.
        stamps: by path in the build folder.
    """

    root: Path
    stage: str
    stamps: dict[str, FileStamp]

    def check_untouched(self) -> None:
        """Holds them against what they were, after they have been read.

        Raises:
            BuildError: one of them was touched in the meantime, so what was read of it may be of
                neither state.
        """
        for name, before in self.stamps.items():
            path = self.root / name
            try:
                touched = FileStamp.of(path) != before
            except OSError:
                touched = True
            if touched:
                raise BuildError(
                    f"{path.resolve()} was changed or touched while it was read: expected it to "
                    f"stay as `{self.stage}` recorded it. Nothing that was made of it counts. Let "
                    "it rest, then run the same command again."
                )


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
            outputs = _digests(value["outputs"])
            stamps = {
                path: FileStamp(entry["size"], entry["mtime_ns"], entry["ctime_ns"], entry["inode"])
                for path, entry in value["outputs"].items()
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

    def check_inputs(self, kind: RecordKind[Facts], *, claimed: bool = False) -> Inputs:
        """Refuses to build on outputs of a stage that changed since it wrote them.

        A file whose stamp is the recorded one is not hashed again; any other is.

        Args:
            kind: of the stage.
            claimed: what follows says what these files hold, so that all of them are hashed.

        Returns:
            What to hold them against once they have been read.

        Raises:
            BuildError: the stage has no record, or a file that it left is gone, has other bytes, or
                has become a link.
        """
        record = self.need(kind)
        stamps = {}
        for name, expected in record.outputs.items():
            problem = self._find_problem(name)
            if problem is None:
                stamps[name] = FileStamp.of(self.root / name)
                if not claimed and stamps[name] == record.stamps.get(name):
                    continue
                if digest_file(self.root / name) != expected:
                    problem = f"changed since `{kind.stage}` recorded it"
            if problem is not None:
                raise BuildError(
                    f"{self.root / name} {problem}: expected {expected.size:,} bytes with sha256 "
                    f"{expected.sha256[:12]}…, as `{kind.stage}` left there. Run "
                    f"`nf4 {kind.stage}` again."
                )
        return Inputs(self.root, kind.stage, stamps)

    def _find_problem(self, name: str) -> str | None:
        """What is wrong with an output, as far as that shows without reading it."""
        path = self.root / name
        # Only download leaves links: what any other points at can change unseen.
        if path.is_symlink() and not name.startswith("source/"):
            return "is a link"
        return None if path.is_file() else "is gone"

    def write_record(self, record: Record[Facts]) -> None:
        """Writes a record; the last thing that a stage does."""
        write_json(
            self._record_path(record.kind),
            {
                "version": RECORD_VERSION,
                "stage": record.kind.stage,
                "key": record.key,
                "outputs": {
                    path: {
                        **(record.stamps.get(path) or FileStamp.of(self.root / path)).to_json(),
                        **digest.to_json(),
                    }
                    for path, digest in sorted(record.outputs.items())
                },
                "inputs": digests_json(record.inputs),
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
                if problem := self._find_problem(name):
                    return State("stale", f"{name} {problem}")
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


def _digests(value: dict[str, Any]) -> dict[str, FileDigest]:
    return {
        path: FileDigest(int(entry["size"]), str(entry["sha256"])) for path, entry in value.items()
    }


def find_builds(artifacts: Path) -> list[Build]:
    """All builds under a folder, the one worked on last first."""
    return [Build(root) for root in build_roots(artifacts)]
