"""What a manifest says of calibration -> sentences for the page and the card. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from nf4_pipeline.manifest.manifest import CalibrationSummary, Manifest
from nf4_pipeline.report.formatting import count, number, size

_SOURCES: Final = {"self": "that the 16-bit model wrote itself", "text": "of a text"}
_DEVICES: Final = {"cpu": "a CPU", "cuda": "a GPU"}
_SHOWN: Final = 3


def describe_tokens(calibration: CalibrationSummary) -> str:
    """On what the codes were chosen."""
    return (
        f"Codes and scales are calibrated on {count(calibration.tokens)} tokens "
        f"{_SOURCES[calibration.source]} ({count(calibration.sequences)} sequences, "
        f"sha256 {calibration.tokens_sha256[:16]}), computed on "
        f"{_DEVICES[calibration.device]}. The format is that of plain NF4: each 4-bit "
        "layer takes the same bytes, and the same readers load it."
        f"{_describe_learning(calibration)}"
    )


def _describe_learning(calibration: CalibrationSummary) -> str:
    """How codes learned, if they did."""
    learning = calibration.learning
    if learning is None:
        return ""
    return (
        f" Then the codes learned, end to end, to predict what the 16-bit model predicts: "
        f"{count(learning.steps)} steps on {count(learning.tokens)} tokens "
        f"{_SOURCES[calibration.source]} (sha256 {learning.tokens_sha256[:16]}). On "
        f"{count(learning.held_back)} sequences that were held back, the KL went from "
        f"{number(learning.kl_before)} to {number(learning.kl_after)}."
    )


def describe_extra_bytes(manifest: Manifest) -> str:
    """What an artifact takes beside plain NF4."""
    extra = manifest.calibration.extra_bytes if manifest.calibration else 0
    return f"for {size(extra)} more" if extra else "at the same bytes"


def list_exceptions(calibration: CalibrationSummary) -> list[str]:
    """What was not calibrated as the rest: weights that fell back, modules left in 16 bit."""
    sentences = []
    if calibration.fallbacks:
        names = [f"{name} ({reason})" for name, reason in calibration.fallbacks.items()]
        sentences.append(f"Not calibrated as the others: {_counted(names, 'weights')}.")
    if calibration.kept:
        names = [
            f"{kept.module} (KL {number(kept.kl)}, {size(kept.bytes)})" for kept in calibration.kept
        ]
        sentences.append(
            "Left in 16 bit, as the most sensitive for their size, for "
            f"{size(calibration.extra_bytes)} more: {_counted(names, 'modules')}."
        )
    return sentences


def _counted(names: Sequence[str], kind: str) -> str:
    left = len(names) - _SHOWN
    rest = f" and {count(left)} more" if left > 0 else ""
    return f"{count(len(names))} {kind}: {', '.join(names[:_SHOWN])}{rest}"
