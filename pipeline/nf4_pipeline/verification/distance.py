"""How far blocks and layers of a 4-bit model are from those of the 16-bit one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import fsum, isfinite, nan, sqrt

import torch

from nf4_pipeline.verification.document import BlockError, LayerError
from nf4_pipeline.verification.shares import Sums


@dataclass
class Ratio:
    """A relative error that is being summed: sqrt(sum of squared differences / sum of squares).

    The sums are exact, so that they are the same in any order.

    Attributes:
        parts: both sums of each call of `add`, float64 [2], wherever they were computed.
    """

    parts: list[torch.Tensor] = field(default_factory=list)

    def add(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        wanted = expected.float().flatten()
        off = actual.float().flatten() - wanted
        self.parts.append(torch.stack([off.dot(off), wanted.dot(wanted)]).double())

    @property
    def sums(self) -> Sums:
        """Of each call."""
        return [(e, n) for e, n in torch.stack(self.parts).tolist()] if self.parts else []

    def take(self, sums: Sums) -> None:
        """Adds what others summed."""
        self.parts += [torch.tensor(pair, dtype=torch.float64) for pair in sums]

    @property
    def value(self) -> float:
        sums = self.sums
        error, energy = (_sum([pair[i] for pair in sums]) for i in (0, 1))
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


def _sum(values: Sequence[float]) -> float:
    """Exact, but for its last rounding."""
    return fsum(values) if all(map(isfinite, values)) else sum(values)


def _digits(value: float) -> float | None:
    """A number with six significant digits; None if it is not finite."""
    return float(f"{value:.6g}") if isfinite(value) else None
