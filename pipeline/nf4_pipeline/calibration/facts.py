"""What is said of a calibration: in the record of quantize, and, but for the machine, to all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from nf4_pipeline.calibration.allocation import Loss
from nf4_pipeline.documents import Document

CALIBRATION_FILE: Final = "calibration.json"
"""In the artifact: the tokens, and the modules that were kept."""

_OF_THE_MACHINE: Final = ("seconds", "peak_device_memory_bytes")


@dataclass(frozen=True, kw_only=True)
class CalibrationFacts(Document):
    """How codes and scales were chosen.

    Attributes:
        source: who wrote the tokens: "self", or "text".
        sequences: of tokens.
        tokens: in all of them.
        tokens_sha256: of their ids.
        device: the kind of device on which the model ran, "cpu" or "cuda".
        fallbacks: weights that are rounded to nearest after all, and why.
        kept: modules that stay in 16 bit under the byte budget.
        extra_bytes: what these take more.
        seconds: wall-clock time of each part of the work.
        peak_device_memory_bytes: of each part of the work.
    """

    source: str
    sequences: int
    tokens: int
    tokens_sha256: str
    device: str
    fallbacks: Mapping[str, str]
    kept: tuple[Loss, ...]
    extra_bytes: int
    seconds: Mapping[str, float]
    peak_device_memory_bytes: Mapping[str, int]

    @property
    def kept_modules(self) -> frozenset[str]:
        """Names of the modules that stay in 16 bit."""
        return frozenset(loss.module for loss in self.kept)

    def public_json(self) -> dict[str, Any]:
        """What the manifest says: all but what is not the same each time."""
        return {name: v for name, v in self.to_json().items() if name not in _OF_THE_MACHINE}
