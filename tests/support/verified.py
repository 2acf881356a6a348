"""Verify in this process: the same requests and results, without two processes that start torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from nf4_pipeline.progress import Reporter
from nf4_pipeline.stages import verify
from nf4_pipeline.verification import launch as run
from nf4_pipeline.verification import worker


def examine_here(monkeypatch: pytest.MonkeyPatch, *, documents: bool = False) -> None:
    """Until the test ends, workers run in this process.

    Args:
        documents: False draws no pictures and writes no report, which take longer than the rest.
    """

    def work(folder: Path, request: dict[str, Any], reporter: Reporter) -> dict[str, Any]:
        path, result = folder / "request.json", folder / "result.json"
        path.write_text(json.dumps({**request, "result": str(result)}), "utf-8")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["worker", str(path)])
            worker.main()
        found: dict[str, Any] = json.loads(result.read_text("utf-8"))
        return found

    monkeypatch.setattr(run, "_run_worker", work)
    if not documents:
        monkeypatch.setattr(verify, "pictures", lambda manifest, found: {})
        monkeypatch.setattr(verify, "report_page", lambda manifest, found: "")
