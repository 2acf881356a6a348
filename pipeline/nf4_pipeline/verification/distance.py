"""How far blocks and layers of a 4-bit model are from those of the 16-bit one."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite, nan, sqrt
from typing import Any

import torch

from nf4_pipeline.verification.document import BlockError, LayerError


@dataclass
class Ratio:
    """A relative error that is being summed: sqrt(sum of squared differences / sum of squares)."""

    error: Any = 0.0
    energy: Any = 0.0

    def add(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        wanted = expected.float().flatten()
        off = actual.float().flatten() - wanted
        self.error = self.error + off.dot(off).double()
        self.energy = self.energy + wanted.dot(wanted).double()

    @property
    def value(self) -> float:
        error, energy = float(self.error), float(self.energy)
        return sqrt(error / energy) if energy else (0.0 if error == 0 else float("inf"))


@dataclass
class LayerDistance:
    """How far a 4-bit layer is from the 16-bit one, as far as both were looked at.

    Attributes:
        output: of its output, for the input that the 16-bit layer gets.
        weight: relative RMSE of its weight.
        worst: see `LayerError` for this and the rest; not a number until it was compared.
    """

    output: Ratio = field(default_factory=Ratio)
    weight: float = nan
    worst: float = nan
    worst_at: int = 0
    scale: float = nan
    scale_at: int = 0
    reach: float = nan
    reach_at: int = 0

    def error(self, name: str, *, output: bool = True) -> LayerError:
        """All of it, with six significant digits, as verification.json holds it.

        Args:
            name: of the layer.
            output: whether its output was looked at.
        """
        return LayerError(
            name=name,
            relative_error=_digits(self.output.value) if output else None,
            weight_error=_digits(self.weight),
            worst=_digits(self.worst),
            worst_at=self.worst_at,
            scale=_digits(self.scale),
            scale_at=self.scale_at,
            reach=_digits(self.reach),
            reach_at=self.reach_at,
        )


@dataclass
class BlockDistance:
    """How far a block is: its hidden states, and its layers by their names within it."""

    hidden: Ratio = field(default_factory=Ratio)
    layers: dict[str, LayerDistance] = field(default_factory=dict)

    def error(self, name: str) -> BlockError:
        """All of it, as verification.json holds it."""
        return BlockError(
            name=name,
            relative_error=_digits(self.hidden.value),
            modules=tuple(layer.error(inner) for inner, layer in self.layers.items()),
        )


def _digits(value: float) -> float | None:
    """A number with six significant digits; None if it is not finite."""
    return float(f"{value:.6g}") if isfinite(value) else None
