"""Verify without what takes longer than the rest."""

from __future__ import annotations

import pytest
from nf4_pipeline.stages import verify


def skip_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, verify draws no pictures and writes no report."""
    monkeypatch.setattr(verify, "pictures", lambda manifest, verification: {})
    monkeypatch.setattr(verify, "report_page", lambda manifest, verification: "")
