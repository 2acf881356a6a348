"""What came of rebuilding artifacts. results.json is a `RebuildDocument`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from nf4_pipeline.documents import Document
from nf4_pipeline.reproduce.compare_files import Difference

SCHEMA_VERSION: Final = 1
SCHEMA_FILE: Final = Path(__file__).with_name("rebuild.schema.json")

Verdict = Literal["PASSED", "FAILED", "NOT_CHECKED"]


@dataclass(frozen=True, kw_only=True)
class ClaimedSource(Document):
    """The source that a manifest names.

    Attributes:
        repo: Hub id, or the name of a local folder.
        commit: None for a local folder.
        confirmed_by: who says so, too; None if it did not come so far.
    """

    repo: str
    commit: str | None
    confirmed_by: str | None


@dataclass(frozen=True, kw_only=True)
class RebuildResult(Document):
    """What came of one artifact.

    Attributes:
        artifact: as it was named.
        commit: of the repo; None for a folder, and where the Hub did not say.
        resource_uri: its package URL, at the commit; None if it was not found.
        verdict: "PASSED" if every byte that the source decides was derived again, and nothing else
            is there but the documents that belong to it, which claim nothing else; "FAILED" if
            something differs; "NOT_CHECKED" if nobody can tell here.
        why: in a sentence.
        differences: file by file.
        not_derived: files that no source decides, which were looked at as far as `notes` say.
        notes: what a reader of the verdict should know.
        source: that the manifest names; None if there is no manifest.
        manifest_sha256: of manifest.json; None if there is none.
        files: how many the artifact has.
        calibrated_on: the device that codes were chosen on again.
        seconds: wall-clock time.
    """

    artifact: str
    commit: str | None = None
    resource_uri: str | None = None
    verdict: Verdict
    why: str
    differences: tuple[Difference, ...] = ()
    not_derived: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source: ClaimedSource | None = None
    manifest_sha256: str | None = None
    files: int = 0
    calibrated_on: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Rebuilt:
    """A result, and what a summary of it names.

    Attributes:
        result: what came of it.
        subjects: name and digests of everything that the artifact holds.
        attestations: sha256 of those that it holds, by path.
    """

    result: RebuildResult
    subjects: tuple[dict[str, Any], ...] = ()
    attestations: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RebuildDocument(Document):
    """results.json, and what `nf4 rebuild --json` says.

    Attributes:
        schema_version: of rebuild.schema.json.
        verifier: who did it, as a URI.
        verified: when it ended, in UTC.
        versions: of what was used, by name.
        results: in the order in which the artifacts were named.
    """

    schema_version: Literal[1]
    verifier: str
    verified: str
    versions: dict[str, str]
    results: tuple[RebuildResult, ...]
