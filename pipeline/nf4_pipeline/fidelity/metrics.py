"""Scores of tokens -> what a model is worth against its reference, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.fidelity.bootstrap import (
    CONFIDENCE,
    RESAMPLES,
    SEGMENT,
    Interval,
    Resampling,
    exp_mean,
    mean,
    quantile,
    share,
)
from nf4_pipeline.fidelity.token_scores import TokenScores

_POSITIONS: Final = 32
"""Parts into which positions in a sequence are cut, at most."""
_KL_EDGES: Final = np.concatenate([[0.0], np.logspace(-7, 1, 33), [np.inf]])
_FIGURES: Final = (
    "mean_kl",
    "median_kl",
    "p99_kl",
    "max_kl",
    "top1_agreement",
    "sure_agreement",
    "perplexity_16bit",
    "perplexity_4bit",
    "perplexity_ratio",
)


@dataclass(frozen=True)
class Fidelity:
    """How far a model (4 bit) is from its reference (16 bit).

    Attributes:
        tokens: on which both were asked for the next one.
        sure_tokens: those of them for which the reference is sure; see `TokenScores.sure`.
        seed: of the bootstrap.
        mean_kl: of KL(reference || model) per token, in nats.
        median_kl: of the same.
        p99_kl: what 99 % of the tokens do not exceed.
        max_kl: the largest.
        top1_agreement: share of tokens for which both rank the same next token first.
        sure_agreement: the agreement where the reference is sure; 1 if it is nowhere.
        perplexity_16bit: exp of the reference's mean negative log-likelihood of the next token.
        perplexity_4bit: the same for the model.
        perplexity_ratio: the second over the first.
    """

    tokens: int
    sure_tokens: int
    seed: int
    mean_kl: Interval
    median_kl: Interval
    p99_kl: Interval
    max_kl: Interval
    top1_agreement: Interval
    sure_agreement: Interval
    perplexity_16bit: Interval
    perplexity_4bit: Interval
    perplexity_ratio: Interval

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Fidelity:
        """What `as_json` wrote; null becomes NaN."""
        figures = {name: Interval.from_json(value[name]) for name in _FIGURES}
        return cls(value["tokens"], value["sure_tokens"], value["seed"], **figures)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON; a number that is not finite becomes null, and no check passes on it."""
        return {
            "tokens": self.tokens,
            "sure_tokens": self.sure_tokens,
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "segment": SEGMENT,
            "seed": self.seed,
            **{name: getattr(self, name).as_json() for name in _FIGURES},
        }


def compare(scores: TokenScores, lengths: Sequence[int], seed: int = 0) -> Fidelity:
    """Sums up the scores of a text.

    Args:
        scores: of all tokens, sequence by sequence.
        lengths: tokens in each sequence.
        seed: of the bootstrap; the same seed gives the same intervals.
    """
    draws = Resampling(lengths, seed)
    every = np.ones(len(scores), np.bool_)
    sure = share(scores.agrees, scores.sure)
    return Fidelity(
        tokens=len(scores),
        sure_tokens=int(scores.sure.sum()),
        seed=seed,
        mean_kl=draws.interval(mean(scores.kl)),
        median_kl=draws.interval(quantile(scores.kl, 0.5)),
        p99_kl=draws.interval(quantile(scores.kl, 0.99)),
        max_kl=_maximum(draws, scores.kl),
        top1_agreement=draws.interval(share(scores.agrees, every)),
        sure_agreement=draws.interval(sure) if scores.sure.any() else Interval(1.0, 1.0, 1.0),
        perplexity_16bit=draws.interval(exp_mean(scores.reference_nll)),
        perplexity_4bit=draws.interval(exp_mean(scores.nll)),
        perplexity_ratio=draws.interval(exp_mean(scores.nll - scores.reference_nll)),
    )


def _maximum(draws: Resampling, values: NDArray[np.float64]) -> Interval:
    if np.isnan(values).any():
        return Interval(np.nan, np.nan, np.nan)
    return draws.interval(quantile(values, 1.0))


def by_domain(
    scores: TokenScores, lengths: Sequence[int], domains: Sequence[str], seed: int = 0
) -> list[dict[str, Any]]:
    """The chief figures of each domain.

    Args:
        scores: of all tokens, sequence by sequence.
        lengths: tokens in each sequence.
        domains: of each sequence.
        seed: of the bootstrap.
    """
    owners = np.repeat(domains, lengths)
    found = []
    for name in dict.fromkeys(domains):
        part = _select(scores, owners == name)
        own = [n for n, domain in zip(lengths, domains, strict=True) if domain == name]
        fidelity = compare(part, own, seed)
        found.append(
            {
                "name": name,
                "tokens": len(part),
                "mean_kl": fidelity.mean_kl.as_json(),
                "top1_agreement": fidelity.top1_agreement.as_json(),
                "perplexity_16bit": fidelity.perplexity_16bit.as_json()["value"],
                "perplexity_4bit": fidelity.perplexity_4bit.as_json()["value"],
            }
        )
    return found


def by_position(scores: TokenScores, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Mean KL along the position of a token in its sequence, in at most 32 parts."""
    positions = np.concatenate([np.arange(length) for length in lengths])
    longest = max(lengths)
    width = -(-longest // _POSITIONS)
    found = []
    for first in range(0, longest, width):
        chosen = scores.kl[(positions >= first) & (positions < first + width)]
        last = min(first + width, longest) - 1
        value = float(chosen.mean())
        found.append(
            {
                "first": first,
                "last": last,
                "tokens": len(chosen),
                "mean_kl": value if np.isfinite(value) else None,
            }
        )
    return found


def histogram(scores: TokenScores) -> dict[str, list[float]]:
    """How many tokens have which KL; the first and the last bin hold what lies beyond."""
    counts, _ = np.histogram(scores.kl[~np.isnan(scores.kl)], bins=_KL_EDGES)
    counts[1] += counts[0]
    counts[-2] += counts[-1]
    edges = [float(f"{edge:.4g}") for edge in _KL_EDGES[1:-1]]
    return {"edges": edges, "counts": [int(count) for count in counts[1:-1]]}


def difference(
    first: TokenScores, second: TokenScores, lengths: Sequence[int], domains: Sequence[str]
) -> dict[str, Any]:
    """Two models against the same reference on the same text, token by token.

    Args:
        first: scores of the one.
        second: scores of the other.
        lengths: tokens in each sequence.
        domains: of each sequence.

    Returns:
        "mean_kl": of the first minus that of the second; "mean_kl_ratio": the first over the
        second; both with intervals, for which the same segments of both are drawn. "domains": the
        "name" of each, and its "mean_kl_ratio".
    """
    owners = np.repeat(domains, lengths)
    parts = []
    for name in dict.fromkeys(domains):
        own = [n for n, domain in zip(lengths, domains, strict=True) if domain == name]
        chosen = owners == name
        ratio = _ratio(Resampling(own), first.kl[chosen], second.kl[chosen])
        parts.append({"name": name, "mean_kl_ratio": ratio})
    draws = Resampling(lengths)
    one, other = mean(first.kl), mean(second.kl)
    return {
        "mean_kl": draws.interval(lambda w: one(w) - other(w)).as_json(),
        "mean_kl_ratio": _ratio(draws, first.kl, second.kl),
        "domains": parts,
    }


def _ratio(
    draws: Resampling, first: NDArray[np.float64], second: NDArray[np.float64]
) -> dict[str, float | None]:
    """The mean of the one over the mean of the other, and its interval."""
    one, other = mean(first), mean(second)

    def ratio(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(one(weights) / other(weights))

    return draws.interval(ratio).as_json()


def is_right(answer: str, expected: str) -> bool:
    """True if the first line of an answer is the expected one, but for case and a final period."""
    lines = answer.strip().splitlines()
    first = lines[0] if lines else ""
    return _plain(first) == _plain(expected)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().casefold()


def _select(scores: TokenScores, chosen: NDArray[np.bool_]) -> TokenScores:
    return TokenScores(
        scores.kl[chosen],
        scores.agrees[chosen],
        scores.sure[chosen],
        scores.reference_nll[chosen],
        scores.nll[chosen],
    )
