"""A worker in the place of the one that builds models: it never ends."""

from __future__ import annotations

from nf4_pipeline.model.architecture import Architecture
from nf4_pipeline.model.probe import ProbeRequest
from nf4_pipeline.progress import Reporter


def run(request: ProbeRequest, reporter: Reporter) -> Architecture:
    """Takes all of a processor, for ever."""
    while True:
        pass
