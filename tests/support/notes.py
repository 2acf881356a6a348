"""A reporter that keeps what it is told."""

from __future__ import annotations

from nf4_pipeline.progress import SilentReporter


class Notes(SilentReporter):
    """Keeps notes, in their order; shows no progress."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)
