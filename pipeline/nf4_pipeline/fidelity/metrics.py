"""Scores of tokens -> what a model is worth against its reference, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.documents import Document
from nf4_pipeline.fidelity.bootstrap import (
    CONFIDENCE,
    RESAMPLES,
    SEGMENT,
    Interval,
    Resampling,
    exp_mean,
    finite_or_none,
    mean,
    quantile,
    share,
)
from nf4_pipeline.fidelity.token_scores import TokenScores

_POSITIONS: Final = 32
"""Parts into which positions in a sequence are cut, at most."""
_KL_EDGES: Final = np.concatenate([[0.0], np.logspace(-7, 1, 33), [np.inf]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity(Document):
    """How far a model (4 bit) is from its reference (16 bit).

    Attributes:
        tokens: on which both were asked for the next one.
        sure_tokens: those of them for which the reference is sure; see `TokenScores.sure`.
        confidence: of the intervals, a share of one.
        resamples: of the bootstrap.
        segment: consecutive tokens that are drawn together, at most.
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
    confidence: float
    resamples: int
    segment: int
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


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainScore(Document):
    """The chief figures of one domain of a text; see `Fidelity`.

    Attributes:
        name: of the domain.
        tokens: of it.
        mean_kl: over them.
        top1_agreement: over them.
        perplexity_16bit: of the reference; None if it is not finite.
        perplexity_4bit: of the model; None if it is not finite.
    """

    name: str
    tokens: int
    mean_kl: Interval
    top1_agreement: Interval
    perplexity_16bit: float | None
    perplexity_4bit: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionScore(Document):
    """Mean KL of the tokens at some positions of their sequences.

    Attributes:
        first: position, counted from 0.
        last: position, included.
        tokens: there, of all sequences.
        mean_kl: over them; None if it is not finite.
    """

    first: int
    last: int
    tokens: int
    mean_kl: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KlHistogram(Document):
    """How many tokens have which KL; the first and the last bin hold what lies beyond.

    Attributes:
        edges: of the bins, in nats, ascending, [bins + 1].
        counts: tokens in each bin, [bins].
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainRatio(Document):
    """The first model's mean KL over the second's, in one domain."""

    name: str
    mean_kl_ratio: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference(Document):
    """Two models against the same reference on the same text, token by token.

    Attributes:
        mean_kl: of the first minus that of the second.
        mean_kl_ratio: of the first over that of the second. For both intervals the same segments
            of both models are drawn.
        domains: the same ratio in each.
    """

    mean_kl: Interval
    mean_kl_ratio: Interval
    domains: tuple[DomainRatio, ...]


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
        confidence=CONFIDENCE,
        resamples=RESAMPLES,
        segment=SEGMENT,
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
) -> tuple[DomainScore, ...]:
    """The chief figures of each domain.

    Args:
        scores: of all tokens, sequence by sequence.
        lengths: tokens in each sequence.
        domains: of each sequence.
        seed: of the bootstrap.
    """
    domain_of_token = np.repeat(domains, lengths)
    parts = []
    for name in dict.fromkeys(domains):
        part = _select(scores, domain_of_token == name)
        fidelity = compare(part, _lengths_of(name, lengths, domains), seed)
        parts.append(
            DomainScore(
                name=name,
                tokens=len(part),
                mean_kl=fidelity.mean_kl,
                top1_agreement=fidelity.top1_agreement,
                perplexity_16bit=finite_or_none(fidelity.perplexity_16bit.value),
                perplexity_4bit=finite_or_none(fidelity.perplexity_4bit.value),
            )
        )
    return tuple(parts)


def _lengths_of(name: str, lengths: Sequence[int], domains: Sequence[str]) -> list[int]:
    """Of the sequences of one domain."""
    return [n for n, domain in zip(lengths, domains, strict=True) if domain == name]


def by_position(scores: TokenScores, lengths: Sequence[int]) -> tuple[PositionScore, ...]:
    """Mean KL along the position of a token in its sequence, in at most 32 parts."""
    positions = np.concatenate([np.arange(length) for length in lengths])
    longest = max(lengths)
    width = -(-longest // _POSITIONS)
    parts = []
    for first in range(0, longest, width):
        kl = scores.kl[(positions >= first) & (positions < first + width)]
        last = min(first + width, longest) - 1
        mean_kl = finite_or_none(float(kl.mean()))
        parts.append(PositionScore(first=first, last=last, tokens=len(kl), mean_kl=mean_kl))
    return tuple(parts)


def histogram(scores: TokenScores) -> KlHistogram:
    """How many tokens have which KL."""
    counts, _ = np.histogram(scores.kl[~np.isnan(scores.kl)], bins=_KL_EDGES)
    counts[1] += counts[0]
    counts[-2] += counts[-1]
    return KlHistogram(
        edges=tuple(float(f"{edge:.4g}") for edge in _KL_EDGES[1:-1]),
        counts=tuple(int(count) for count in counts[1:-1]),
    )


def difference(
    first: TokenScores, second: TokenScores, lengths: Sequence[int], domains: Sequence[str]
) -> Difference:
    """Holds two models against each other that were scored against the same reference.

    Args:
        first: scores of the one.
        second: scores of the other, of the same text.
        lengths: tokens in each sequence.
        domains: of each sequence.
    """
    domain_of_token = np.repeat(domains, lengths)
    ratios = []
    for name in dict.fromkeys(domains):
        draws = Resampling(_lengths_of(name, lengths, domains))
        chosen = domain_of_token == name
        ratio = _ratio(draws, first.kl[chosen], second.kl[chosen])
        ratios.append(DomainRatio(name=name, mean_kl_ratio=ratio))
    draws = Resampling(lengths)
    one, other = mean(first.kl), mean(second.kl)
    return Difference(
        mean_kl=draws.interval(lambda weights: one(weights) - other(weights)),
        mean_kl_ratio=_ratio(draws, first.kl, second.kl),
        domains=tuple(ratios),
    )


def _ratio(draws: Resampling, first: NDArray[np.float64], second: NDArray[np.float64]) -> Interval:
    """The mean of the one over the mean of the other, and its interval."""
    one, other = mean(first), mean(second)

    def ratio(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(one(weights) / other(weights))

    return draws.interval(ratio)


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
