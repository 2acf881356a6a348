"""Verify without what takes longer than the rest, or starts processes of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from nf4_pipeline.readers.document import ReaderResult
from nf4_pipeline.readers.read import OwnReading, Readers
from nf4_pipeline.stages import verify
from nf4_pipeline.verification.launch import Examination, Workers
from nf4_pipeline.verification.messages import SourceReply


def skip_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, verify draws no pictures and writes no report."""
    monkeypatch.setattr(verify, "pictures", lambda manifest, verification: {})
    monkeypatch.setattr(verify, "report_page", lambda *_: "<p>Not the report.</p>\n")


def skip_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, nobody but our loader reads the export."""
    monkeypatch.setattr(verify, "Readers", NoReaders)


class NoReaders(Readers):
    """In the place of those who read an export as its users do: nobody reads it."""

    def __enter__(self) -> NoReaders:
        return self

    def results(self, own: OwnReading) -> tuple[ReaderResult, ...]:
        return ()


def ask_source(asked: Examination, artifact: Path) -> SourceReply:
    """What the 16-bit model says, with the tokenizer of an artifact."""
    with Workers() as workers, workers.source().start(asked.source_request(artifact)) as child:
        return child.wait()
