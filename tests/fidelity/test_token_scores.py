"""Scores of single tokens, by hand and against float64."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.fidelity.token_scores import TokenScores, score_tokens

INF: Final = float("inf")
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
SCALES: Final = (0.0, 1e-3, 0.3, 1.0, 4.0, 30.0, 1e3, 2e4)
FALCON_VOCABULARY: Final = 65_024


def log(*rows: tuple[float, ...]) -> torch.Tensor:
    """Logits of distributions; a probability of 0 is a logit of -inf."""
    return torch.tensor(rows).log()


def score(
    reference: torch.Tensor, model: torch.Tensor, targets: list[int] | None = None
) -> TokenScores:
    wanted = [0] * len(reference) if targets is None else targets
    return score_tokens(reference, model, torch.tensor(wanted))


def kl_in_float64(reference: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (reference, model))
    terms = torch.where(q == -INF, INF, p.exp() * (p - q))
    return torch.where(p == -INF, 0.0, terms).sum(-1)


def assert_near(
    found: np.ndarray[tuple[int, ...], np.dtype[np.float64]], exact: torch.Tensor
) -> None:
    """Within 1e-6 nats, and of KL itself where that is more than one nat.

    A log-probability is rounded to float32 (a share of u = 2**-24) when the largest logit is taken
    off and when the logarithm of the sum is. Weighted by p, the log-probabilities of both models
    have the sizes H and H + KL, H at most the logarithm of the vocabulary (11.1 for 65,024). So KL
    is off by some 2 u (2 H + KL) at most, 2.6e-6 + 1.2e-7 KL, if all roundings pointed the same
    way; they do not, and a third of that leaves room.
    """
    expected = exact.numpy()
    finite = np.isfinite(expected)
    assert np.array_equal(found[~finite], expected[~finite])
    off = np.abs(found[finite] - expected[finite]) / (1 + expected[finite])
    assert off.max(initial=0) <= 1e-6


def test_numbers_by_hand() -> None:
    found = score(
        log((0.5, 0.25, 0.25), (0.1, 0.8, 0.1)), log((0.25, 0.5, 0.25), (0.1, 0.8, 0.1)), [0, 1]
    )
    assert len(found) == 2
    # 0.5 ln(0.5 / 0.25) + 0.25 ln(0.25 / 0.5) + 0.25 ln 1
    assert found.kl[0] == pytest.approx(0.25 * math.log(2), abs=1e-6)
    assert found.kl[1] == 0.0
    assert found.agrees.tolist() == [False, True]
    assert found.reference_nll == pytest.approx([-math.log(0.5), -math.log(0.8)], abs=1e-6)
    assert found.nll == pytest.approx([-math.log(0.25), -math.log(0.8)], abs=1e-6)
    assert {found.kl.dtype, found.reference_nll.dtype, found.nll.dtype} == {np.dtype(np.float64)}
    assert {found.agrees.dtype, found.sure.dtype} == {np.dtype(np.bool_)}


def test_kl_is_of_the_reference_against_the_model() -> None:
    sure, unsure = log((0.98, 0.01, 0.01)), log((0.4, 0.3, 0.3))
    there, back = score(sure, unsure).kl[0], score(unsure, sure).kl[0]
    assert there == pytest.approx(0.98 * math.log(0.98 / 0.4) + 0.02 * math.log(0.01 / 0.3), 1e-5)
    assert back == pytest.approx(0.4 * math.log(0.4 / 0.98) + 0.6 * math.log(0.3 / 0.01), 1e-5)
    assert back > there + 0.5


def test_sure_is_at_least_twice_as_likely_and_asks_the_reference_alone() -> None:
    reference = log((0.67, 0.33, 0.0), (0.66, 0.34, 0.0), (0.402, 0.2, 0.398), (1.0, 0.0, 0.0))
    sure = [True, False, False, True]
    assert score(reference, torch.zeros(4, 3)).sure.tolist() == sure
    assert score(reference, reference).sure.tolist() == sure
    assert not score(torch.zeros(4, 3), reference).sure.any()


def test_a_token_that_cannot_come() -> None:
    never = log((0.5, 0.5, 0.0))
    # Under neither model: it counts for nothing.
    assert score(never, log((0.25, 0.75, 0.0))).kl[0] == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6
    )
    # Not under the reference, but under the model: what the model gives it is lost to the others.
    assert score(never, log((0.4, 0.4, 0.2))).kl[0] == pytest.approx(math.log(1.25), abs=1e-6)
    # Under the reference, but not under the model: no distance is larger.
    there = score(log((0.4, 0.4, 0.2)), never, [2])
    assert (there.kl[0], there.nll[0]) == (INF, INF)
    assert there.reference_nll[0] == pytest.approx(-math.log(0.2), abs=1e-6)
    # However seldom: here so seldom that its probability is 0 in float32.
    assert score(torch.tensor([[0.0, -500.0]]), log((1.0, 0.0))).kl[0] == INF


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("side", ["reference", "model", "both"])
def test_logits_that_mean_nothing_give_nan(bad: float, side: str) -> None:
    good, spoiled = torch.zeros(1, 4), torch.tensor([[0.0, bad, 0.0, 0.0]])
    found = score(good if side == "model" else spoiled, good if side == "reference" else spoiled)
    assert np.isnan(found.kl[0])


def test_many_tokens_are_scored_as_each_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    reference, model = torch.randn(2, 300, 11, generator=rng).unbind()
    targets = torch.randint(0, 11, (300,), generator=rng)
    found = score_tokens(reference, model, targets)
    alone = TokenScores.joined(
        [score_tokens(reference[[i]], model[[i]], targets[[i]]) for i in range(300)]
    )
    assert len(found) == len(alone) == 300
    for name in ("kl", "agrees", "sure", "reference_nll", "nll"):
        assert np.array_equal(getattr(found, name), getattr(alone, name)), name


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two models for a few tokens: of many sizes, near each other or not, some -inf."""
    rows, vocabulary = draw(st.integers(1, 5)), draw(st.integers(2, 300))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    reference = torch.randn(rows, vocabulary, generator=rng) * draw(st.sampled_from(SCALES))
    apart = torch.randn(rows, vocabulary, generator=rng) * draw(st.sampled_from(SCALES))
    model = reference + apart * draw(st.sampled_from([1e-3, 0.1, 1.0]))
    for logits in draw(st.sampled_from([(), (reference,), (model,), (reference, model)])):
        never = torch.rand(rows, vocabulary, generator=rng) < 0.2
        never[:, 0] = False  # something can always come
        logits[never] = -INF
    shift = draw(st.sampled_from([0.0, 500.0, -500.0]))
    return _stored(reference + shift, dtype), _stored(model, dtype)


def _stored(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In another dtype, where what is finite stays finite."""
    largest = torch.finfo(dtype).max
    return torch.where(logits == -INF, logits, logits.clamp(-largest, largest)).to(dtype)


@given(pairs())
def test_float32_is_near_float64(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    reference, model = pair
    found = score(reference, model).kl
    assert (found >= 0).all()
    assert_near(found, kl_in_float64(reference, model))


@given(pairs())
def test_equal_logits_are_exactly_equal(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    for logits in pair:
        found = score(logits, logits.clone())
        assert (found.kl == 0.0).all()
        assert found.agrees.all()
        assert np.array_equal(found.nll, found.reference_nll)


@pytest.mark.parametrize("scale", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("apart", [0.02, 0.1, 0.3, 1.0])
def test_float32_is_near_float64_for_a_large_vocabulary(scale: float, apart: float) -> None:
    """65,024 small numbers have to be added without losing most of them."""
    rng = torch.Generator().manual_seed(1)
    reference = torch.randn(8, FALCON_VOCABULARY, generator=rng) * scale
    model = reference + torch.randn(8, FALCON_VOCABULARY, generator=rng) * scale * apart
    assert_near(score(reference, model).kl, kl_in_float64(reference, model))
