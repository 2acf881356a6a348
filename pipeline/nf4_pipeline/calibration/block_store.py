"""What was chosen, block by block, on disk: a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nf4_pipeline.calibration.allocation import Loss
from nf4_pipeline.checkpoint.atomic import (
    make_folder,
    remove_leftovers,
    write_bytes,
    write_json,
)
from nf4_pipeline.gptq.quantizer import Choice

_FACTS: Final = "nf4"
_SUFFIX: Final = ".safetensors"
_MEASURED: Final = "sensitivity.json"


class Store:
    """A folder with one file for each block that is done. A file is whole, or it is not there.

    Args:
        folder: holds the choices of one calibration.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self) -> None:
        """Makes the folder, and clears away what a killed run left half-written in it."""
        make_folder(self.folder)
        remove_leftovers(self.folder)

    def path(self, unit: str) -> Path:
        return self.folder / f"{unit}{_SUFFIX}"

    def facts(self, unit: str) -> dict[str, Any] | None:
        """What was noted of a block, or None if it is not done."""
        try:
            with safe_open(self.path(unit), framework="np") as file:
                found: dict[str, Any] = json.loads(file.metadata()[_FACTS])
                return found if found["unit"] == unit else None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def done(self, unit: str, weights: Collection[str]) -> bool:
        """Whether a block's file holds what was written, and all of these weights; reads it."""
        facts = self.facts(unit)
        if facts is None or {*facts["weights"], *facts["fallbacks"]} != set(weights):
            return False
        try:
            with safe_open(self.path(unit), framework="np") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            return bool(facts["sha256"] == _digest(tensors))
        except (OSError, SafetensorError, KeyError):
            return False

    def files(self) -> dict[str, Path]:
        """Name of a weight -> the file that holds its choice."""
        found: dict[str, Path] = {}
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            facts = self.facts(path.name.removesuffix(_SUFFIX))
            found |= dict.fromkeys((facts or {}).get("weights", ()), path)
        return found

    def fallbacks(self) -> dict[str, str]:
        """Name of a weight that was not calibrated -> why not."""
        found: dict[str, str] = {}
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            facts = self.facts(path.name.removesuffix(_SUFFIX))
            found |= (facts or {}).get("fallbacks", {})
        return dict(sorted(found.items()))

    def measured(self) -> list[Loss] | None:
        """What `keep_measured` kept, or None."""
        try:
            values = json.loads((self.folder / _MEASURED).read_text("utf-8"))
            return [Loss(**value) for value in values]
        except (OSError, ValueError, TypeError):
            return None

    def keep_measured(self, losses: list[Loss]) -> None:
        """Keeps what each layer loses."""
        write_json(self.folder / _MEASURED, [loss.to_json() for loss in losses])

    def write(self, unit: str, choices: Mapping[str, Choice], facts: Mapping[str, Any]) -> None:
        """Keeps a block.

        Args:
            unit: its name.
            choices: by the name of the weight.
            facts: plain JSON, of which "weights" and "fallbacks" name every weight of it.
        """
        tensors: dict[str, Any] = {}
        for name, choice in choices.items():
            tensors[f"{name}:codes"] = choice.packed
            tensors[f"{name}:scales"] = choice.scales.codes
            tensors[f"{name}:nested"] = choice.scales.absmax
        tensors = tensors or {":nothing": np.zeros(1, np.uint8)}
        noted = json.dumps({**facts, "unit": unit, "sha256": _digest(tensors)}, sort_keys=True)
        write_bytes(self.path(unit), save(tensors, {_FACTS: noted}))


def _digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    """The sha256 of tensors, one after the other by name."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name}\0".encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return total.hexdigest()
