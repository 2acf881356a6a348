"""How far a figure could be off by the luck of the text: bootstrap intervals.

Neighbouring tokens are alike, so whole segments of consecutive tokens are drawn again, not single
ones (block bootstrap: Kuensch, 1989; percentile intervals: Efron, 1979).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.documents import Document

SEGMENT: Final = 64
"""Tokens in a segment, at most; a segment never crosses from one sequence into the next."""
RESAMPLES: Final = 1000
CONFIDENCE: Final = 0.95

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Weights of tokens, [draws, tokens] -> a value for each draw, [draws]."""


@dataclass(frozen=True, slots=True)
class Interval(Document):
    """A figure, and between what bounds it would lie on other texts of the same kind.

    In JSON a number that is not finite is null, and null is read as NaN.

    Attributes:
        value: measured.
        low: lower end of the interval.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @property
    def is_finite(self) -> bool:
        """True if all three are."""
        return isfinite(self.value) and isfinite(self.low) and isfinite(self.high)

    def __format__(self, spec: str) -> str:
        """ "value [low, high]", each number in the format `spec`."""
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def to_json(self) -> dict[str, float | None]:
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {name: finite_or_none(number) for name, number in numbers.items()}

    @classmethod
    def from_json(cls, value: Any) -> Interval:
        stored = _StoredInterval.from_json(value)
        return cls(*(nan if n is None else n for n in (stored.value, stored.low, stored.high)))


@dataclass(frozen=True, slots=True)
class _StoredInterval(Document):
    """An interval as it stands in JSON."""

    value: float | None
    low: float | None
    high: float | None


def finite_or_none(number: float) -> float | None:
    """What JSON can hold: None for NaN and the infinities."""
    return number if isfinite(number) else None


class Resampling:
    """Draws of segments, the same for every figure that is computed from them.

    Args:
        lengths: tokens in each sequence, in order.
        seed: of the draws.
    """

    def __init__(self, lengths: Sequence[int], seed: int = 0) -> None:
        segments: list[int] = []
        for length in lengths:
            count = -(-length // SEGMENT)
            segments += [len(part) for part in np.array_split(np.arange(length), max(count, 1))]
        self._sizes = np.array([size for size in segments if size], np.int64)
        count = len(self._sizes)
        rng = np.random.default_rng(seed)
        self._draws = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)

    def interval(self, statistic: Statistic) -> Interval:
        """The value of a statistic on all tokens, and its interval.

        Args:
            statistic: takes how often each token counts in each draw.
        """
        tokens = int(self._sizes.sum())
        value = float(statistic(np.ones((1, tokens)))[0])
        drawn = np.concatenate(
            [
                statistic(np.repeat(part, self._sizes, axis=1).astype(np.float64))
                for part in np.array_split(self._draws, 20)
            ]
        )
        drawn = drawn[~np.isnan(drawn)]
        if not len(drawn):
            return Interval(value, np.nan, np.nan)
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(drawn, [tail, 1 - tail], method="nearest")
        return Interval(value, float(low), float(high))


def mean(values: NDArray[np.float64]) -> Statistic:
    """The mean over tokens."""

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):  # a draw without a value that is infinite: no number
            return np.asarray((weights @ values) / weights.sum(axis=1))

    return statistic


def share(hits: NDArray[np.bool_], among: NDArray[np.bool_]) -> Statistic:
    """The share of `among` that are `hits`; NaN where there are none."""

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        count = weights @ among.astype(np.float64)
        hit_count = weights @ (hits & among).astype(np.float64)
        return np.asarray(hit_count / np.where(count > 0, count, np.nan))

    return statistic


def quantile(values: NDArray[np.float64], level: float) -> Statistic:
    """The smallest value that at least a share `level` of the tokens does not exceed."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        filled = np.cumsum(weights[:, order], axis=1)
        wanted = level * filled[:, -1]
        # The first place at which enough tokens have been passed.
        places = (filled < wanted[:, None] * (1 - 1e-12)).sum(axis=1)
        return np.asarray(ordered[places])

    return statistic


def exp_mean(values: NDArray[np.float64]) -> Statistic:
    """exp of the mean: a perplexity, from negative log-likelihoods."""
    inner = mean(values)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(inner(weights)))

    return statistic
