"""What a manifest says of calibration -> sentences for the page and the card. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from nf4_pipeline.report import formatting as words

_SOURCES: Final = {"self": "that the 16-bit model wrote itself", "text": "of a text"}
_DEVICES: Final = {"cpu": "a CPU", "cuda": "a GPU"}
_SHOWN: Final = 3


def chosen(calibration: Mapping[str, Any]) -> str:
    """On what the codes were chosen."""
    return (
        f"Codes and scales are calibrated on {words.count(calibration['tokens'])} tokens "
        f"{_SOURCES[calibration['source']]} ({words.count(calibration['sequences'])} sequences, "
        f"sha256 {calibration['tokens_sha256'][:16]}), computed on "
        f"{_DEVICES[calibration['device']]}. The format is that of plain NF4: each 4-bit "
        "layer takes the same bytes, and the same readers load it."
    )


def at_what_size(manifest: Mapping[str, Any]) -> str:
    """What an artifact takes beside plain NF4."""
    more = manifest.get("calibration", {}).get("extra_bytes", 0)
    return f"for {words.size(more)} more" if more else "at the same bytes"


def exceptions(calibration: Mapping[str, Any]) -> list[str]:
    """What was not calibrated as the rest: weights that fell back, modules left in 16 bit."""
    found = []
    if calibration["fallbacks"]:
        names = [f"{name} ({reason})" for name, reason in calibration["fallbacks"].items()]
        found.append(f"Not calibrated as the others: {_counted(names, 'weights')}.")
    if calibration["kept"]:
        names = [
            f"{kept['module']} (KL {words.number(kept['kl'])}, {words.size(kept['bytes'])})"
            for kept in calibration["kept"]
        ]
        more = words.size(calibration["extra_bytes"])
        found.append(
            f"Left in 16 bit, as the most sensitive for their size, for {more} more: "
            f"{_counted(names, 'modules')}."
        )
    return found


def _counted(names: Sequence[str], kind: str) -> str:
    left = len(names) - _SHOWN
    rest = f" and {words.count(left)} more" if left > 0 else ""
    return f"{words.count(len(names))} {kind}: {', '.join(names[:_SHOWN])}{rest}"
