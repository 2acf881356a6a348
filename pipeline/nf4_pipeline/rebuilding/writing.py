"""What came of rebuilding, as files for others: summaries, badges, a table, results.json."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.atomic import json_bytes, make_folder, write_bytes
from nf4_pipeline.checkpoint.model_name import model_path
from nf4_pipeline.errors import UsageError
from nf4_pipeline.provenance.identifiers import tool_versions
from nf4_pipeline.provenance.summary import VERIFIER, verification_summary
from nf4_pipeline.rebuilding.accounting import POLICY
from nf4_pipeline.rebuilding.results import (
    SCHEMA_VERSION,
    RebuildDocument,
    RebuildResult,
    Rebuilt,
    Verdict,
)
from nf4_pipeline.report.markdown import in_cell, table

RESULTS_FILE: Final = "results.json"
TABLE_FILE: Final = "README.md"
SUMMARY_ENDING: Final = ".vsa.json"
BADGE_ENDING: Final = ".svg"
ENDPOINT_ENDING: Final = ".badge.json"

_LABEL: Final = "nf4 rebuild"
_MESSAGES: Final[dict[Verdict, tuple[str, str, str]]] = {
    "PASSED": ("reproduced", "#2b7a3f", "brightgreen"),
    "FAILED": ("differs", "#b3261e", "red"),
    "NOT_CHECKED": ("not checkable", "#5f6368", "lightgrey"),
}
"""What a badge says, and its colour, here and as shields.io calls it."""

_SVG: Final = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" '
    'aria-label="{label}: {message}">\n'
    "<title>{title}</title>\n"
    '<rect width="{width}" height="20" rx="3" fill="#3c4043"/>\n'
    '<rect x="{left}" width="{right}" height="20" rx="3" fill="{colour}"/>\n'
    '<rect x="{left}" width="6" height="20" fill="{colour}"/>\n'
    '<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">\n'
    '<text x="8" y="14" textLength="{left_text}">{label}</text>\n'
    '<text x="{middle}" y="14" textLength="{right_text}">{message}</text>\n'
    "</g>\n</svg>\n"
)
_CHARACTER: Final = 6.2  # pixels of a letter of 11 px Verdana, on average


@dataclass(frozen=True)
class Writer:
    """Puts results into a folder.

    Attributes:
        verifier: who did it, as a URI.
        verified: when, as RFC 3339 in UTC.
    """

    verifier: str = VERIFIER
    verified: str = ""

    def document(self, rebuilt: Sequence[Rebuilt]) -> RebuildDocument:
        """What results.json holds."""
        return RebuildDocument(
            schema_version=SCHEMA_VERSION,
            verifier=self.verifier,
            verified=self.verified or now(),
            versions=tool_versions(),
            results=tuple(each.result for each in rebuilt),
        )

    def write(self, rebuilt: Sequence[Rebuilt], folder: Path) -> dict[str, Path]:
        """Writes everything, and takes away what an earlier run said of the same artifacts.

        Args:
            rebuilt: what came of each.
            folder: where to; made if need be.

        Returns:
            The summary of each artifact that has one, by its name.
        """
        make_folder(folder)
        document = self.document(rebuilt)
        summaries = {}
        for each, stem in zip(rebuilt, file_names(rebuilt), strict=True):
            result = each.result
            path = folder / f"{stem}{SUMMARY_ENDING}"
            if (summary := self.summary(each, document)) is None:
                path.unlink(missing_ok=True)  # of an earlier run; nobody can say it today
            else:
                write_bytes(path, json_bytes(summary))
                summaries[result.artifact] = path
            write_bytes(folder / f"{stem}{BADGE_ENDING}", badge(result).encode())
            write_bytes(folder / f"{stem}{ENDPOINT_ENDING}", json_bytes(endpoint(result)))
        write_bytes(folder / RESULTS_FILE, json_bytes(document.to_json()))
        write_bytes(folder / TABLE_FILE, markdown(document, file_names(rebuilt)).encode())
        return summaries

    def summary(self, rebuilt: Rebuilt, document: RebuildDocument) -> dict[str, Any] | None:
        """The verification summary of an artifact; None where nobody can tell."""
        result = rebuilt.result
        if result.verdict == "NOT_CHECKED" or result.resource_uri is None or not rebuilt.subjects:
            return None
        return verification_summary(
            resource_uri=result.resource_uri,
            subjects=rebuilt.subjects,
            passed=result.verdict == "PASSED",
            verified=document.verified,
            verifier=self.verifier,
            tools=document.versions,
            policy=POLICY,
            attestations=rebuilt.attestations,
        )


def now() -> str:
    """This second, as RFC 3339 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def file_names(rebuilt: Sequence[Rebuilt]) -> list[str]:
    """How the files of each artifact begin: "ORG--NAME"; the same each time, and no two alike."""
    names: list[str] = []
    for each in rebuilt:
        stem = _stem(each.result.artifact)
        taken = {name.casefold() for name in names}
        number, name = 1, stem
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names


def _stem(artifact: str) -> str:
    said = artifact
    with suppress(UsageError):  # a name that no path can have
        if (path := model_path(artifact)).is_dir():
            said = path.resolve().name
    stem = re.sub(r"[^\w.@-]", "-", said.replace("/", "--"), flags=re.ASCII).lstrip(".-")
    return stem[:150] or "artifact"


def badge(result: RebuildResult) -> str:
    """A small picture that needs nothing else."""
    message, colour, _ = _MESSAGES[result.verdict]
    left_text, right_text = (round(_CHARACTER * len(text)) for text in (_LABEL, message))
    left, right = left_text + 14, right_text + 14
    return _SVG.format(
        width=left + right,
        left=left,
        right=right,
        middle=left + 7,
        left_text=left_text,
        right_text=right_text,
        colour=colour,
        label=_LABEL,
        message=message,
        title=escape(f"{_LABEL}: {message}, {result.commit or 'a folder'}"),
    )


def endpoint(result: RebuildResult) -> dict[str, Any]:
    """What shields.io draws a badge of."""
    message, _, colour = _MESSAGES[result.verdict]
    return {"schemaVersion": 1, "label": _LABEL, "message": message, "color": colour}


def markdown(document: RebuildDocument, names: Sequence[str]) -> str:
    """The table over all.

    Args:
        document: what came of it.
        names: how the files of each artifact begin; none are linked without.
    """
    rows = []
    for result, stem in zip(document.results, names or [""] * len(document.results), strict=True):
        verdict = f"**{result.verdict}**" if result.verdict == "FAILED" else result.verdict
        if stem and result.verdict != "NOT_CHECKED":
            verdict = f"[{verdict}](<{stem}{SUMMARY_ENDING}>)"
        source = "" if result.source is None else _source(result)
        artifact, why = in_cell(result.artifact), in_cell(result.why)
        rows.append((artifact, (result.commit or "")[:12], verdict, source, why))
    counts = {verdict: 0 for verdict in _MESSAGES}
    for result in document.results:
        counts[result.verdict] += 1
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    head = ("artifact", "commit", "verdict", "source", "why")
    return (
        f"# Rebuilt with nf4-pipeline {document.versions['nf4-pipeline']}\n\n"
        f"{len(document.results)} artifacts: {said}. {document.verified}, by "
        f"{in_cell(document.verifier)}.\n\n{table(head, rows)}\n\n"
        "PASSED: every byte that source and recipe decide was derived again, nothing else is "
        "there but known documents, and these claim nothing else. It says nothing of who built it, "
        "nor of the figures that were measured. NOT_CHECKED: nobody can tell here.\n"
    )


def _source(result: RebuildResult) -> str:
    source = result.source
    assert source is not None
    return in_cell(source.repo + ("" if source.commit is None else f" at {source.commit[:12]}"))
