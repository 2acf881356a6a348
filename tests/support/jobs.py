"""Stages in one line each, on the CPU and silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from nf4_pipeline.machine import Machine
from nf4_pipeline.progress import SILENT
from nf4_pipeline.stages.download import Download, Downloaded, DownloadRequest

CPU: Final = Machine(device="cpu")


def download(model: str | Path, artifacts: Path, **options: Any) -> Downloaded:
    """Runs `download`; `options` are those of a `DownloadRequest`."""
    return Download(DownloadRequest(str(model), artifacts, **options), SILENT).run()
