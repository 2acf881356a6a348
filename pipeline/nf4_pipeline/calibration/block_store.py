"""What was chosen, block by block, on disk: a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nf4_pipeline.checkpoint.atomic import (
    make_folder,
    remove_leftovers,
    write_bytes,
)
from nf4_pipeline.documents import Document, key
from nf4_pipeline.gptq.quantizer import QuantizedWeight
from nf4_pipeline.gptq.saved_codes import read_codes, tensors_of

_FACTS: Final = "nf4"
_SUFFIX: Final = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class BlockFacts(Document):
    """What is noted of a block beside its codes and scales.

    Attributes:
        block: its name.
        weights: those that were calibrated, sorted.
        costs: of each of them.
        fallbacks: name of a weight that was not calibrated -> why not.
        sha256: of what the file holds.
    """

    block: str = field(metadata=key("unit"))
    weights: tuple[str, ...]
    costs: dict[str, float]
    fallbacks: dict[str, str]
    sha256: str


class BlockStore:
    """A folder with one file for each block that is done. A file is whole, or it is not there.

    Args:
        folder: holds what one calibration chose.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self) -> None:
        """Makes the folder, and clears away what a killed run left half-written in it."""
        make_folder(self.folder)
        remove_leftovers(self.folder)

    def path(self, block: str) -> Path:
        return self.folder / f"{block}{_SUFFIX}"

    def facts(self, block: str) -> BlockFacts | None:
        """What was noted of a block, or None if it is not done."""
        try:
            with safe_open(self.path(block), framework="np") as file:
                facts = BlockFacts.from_json(json.loads(file.metadata()[_FACTS]))
                return facts if facts.block == block else None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def is_done(self, block: str, weights: Collection[str]) -> bool:
        """Whether a block's file holds what was written, and all of these weights; reads it."""
        facts = self.facts(block)
        if facts is None or {*facts.weights, *facts.fallbacks} != set(weights):
            return False
        try:
            with safe_open(self.path(block), framework="np") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            return bool(facts.sha256 == _digest(tensors))
        except (OSError, SafetensorError, KeyError):
            return False

    def files(self) -> dict[str, Path]:
        """Name of a weight -> the file that holds its codes and scales."""
        files: dict[str, Path] = {}
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            facts = self.facts(path.name.removesuffix(_SUFFIX))
            files |= dict.fromkeys(facts.weights if facts else (), path)
        return files

    def fallbacks(self) -> dict[str, str]:
        """Name of a weight that was not calibrated -> why not."""
        reasons: dict[str, str] = {}
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            facts = self.facts(path.name.removesuffix(_SUFFIX))
            reasons |= facts.fallbacks if facts else {}
        return dict(sorted(reasons.items()))

    def read(self, block: str) -> dict[str, QuantizedWeight]:
        """What `write` kept of a block that is done, without those that were not calibrated."""
        facts, path = self.facts(block), self.path(block)
        assert facts is not None  # of a block that is done
        return {
            name: QuantizedWeight(*read_codes(path, name), facts.costs[name])
            for name in facts.weights
        }

    def write(
        self, block: str, weights: Mapping[str, QuantizedWeight], fallbacks: dict[str, str]
    ) -> None:
        """Keeps a block.

        Args:
            block: its name.
            weights: codes and scales by the name of the weight.
            fallbacks: name of each weight of it that was not calibrated -> why not.
        """
        tensors: dict[str, NDArray[Any]] = {}
        for name, weight in weights.items():
            tensors |= tensors_of(name, weight)
        tensors = tensors or {":nothing": np.zeros(1, np.uint8)}
        facts = BlockFacts(
            block=block,
            weights=tuple(sorted(weights)),
            costs={name: weight.cost for name, weight in weights.items()},
            fallbacks=fallbacks,
            sha256=_digest(tensors),
        )
        noted = json.dumps(facts.to_json(), sort_keys=True)
        write_bytes(self.path(block), save(tensors, {_FACTS: noted}))


def _digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    """The sha256 of tensors, one after the other by name."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name}\0".encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return total.hexdigest()
