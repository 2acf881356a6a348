"""What the record of quantize says of a calibration: the manifest's summary, and what it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from nf4_pipeline.manifest.manifest import CalibrationSummary

CALIBRATION_FILE: Final = "calibration.json"
"""In the artifact: the tokens, and the modules that were kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationFacts(CalibrationSummary):
    """How codes and scales were chosen, and what that took on this machine.

    Attributes:
        seconds: wall-clock time of each part of the work.
        peak_device_memory_bytes: of each part of the work.
    """

    seconds: Mapping[str, float]
    peak_device_memory_bytes: Mapping[str, int]

    @property
    def kept_modules(self) -> frozenset[str]:
        """Names of the modules that stay in 16 bit."""
        return frozenset(kept.module for kept in self.kept)


def public_calibration(facts: CalibrationFacts) -> CalibrationSummary:
    """What the manifest says: all but what is not the same each time."""
    return CalibrationSummary.from_json(facts.to_json())
