"""Stages in one line each, on the CPU and silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from nf4_pipeline.machine import Machine
from nf4_pipeline.progress import SILENT
from nf4_pipeline.stages.download import Download, Downloaded
from nf4_pipeline.stages.download_request import DownloadRequest
from nf4_pipeline.verification.document import Thresholds, Verification

CPU: Final = Machine(device="cpu")
PASSED: Final = Verification(
    schema_version=3,
    verdict="pass",
    thresholds=Thresholds(
        max_mean_kl=0.5, min_sure_agreement=0.8, max_perplexity_ratio=1.5, max_accuracy_drop=0.1
    ),
    checks=(),
    versions={},
)
"""What a record of verify holds at least, for tests that measure nothing."""


def download(model: str | Path, artifacts: Path, **options: Any) -> Downloaded:
    """Runs `download`; `options` are those of a `DownloadRequest`."""
    return Download(DownloadRequest(str(model), artifacts, **options), SILENT).run()
