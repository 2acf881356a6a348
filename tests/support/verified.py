"""Verify without what takes longer than the rest, or starts processes of its own."""

from __future__ import annotations

import pytest
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.readers.document import ReaderResult
from nf4_pipeline.readers.read import OwnReading, Readers
from nf4_pipeline.stages import verify


def skip_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, verify draws no pictures and writes no report."""
    monkeypatch.setattr(verify, "pictures", lambda manifest, verification: {})
    monkeypatch.setattr(verify, "report_page", lambda *_: "<p>Not the report.</p>\n")


def skip_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, nobody but our loader reads the export."""
    monkeypatch.setattr(verify, "Readers", _NoReaders)


class _NoReaders(Readers):
    def __enter__(self) -> _NoReaders:
        return self

    def results(self, own: OwnReading, reporter: Reporter = SILENT) -> tuple[ReaderResult, ...]:
        return ()
