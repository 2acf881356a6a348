"""Statistics of resampled tokens against the tokens themselves, and intervals against the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4_pipeline.fidelity.bootstrap import (
    CONFIDENCE,
    RESAMPLES,
    SEGMENT,
    Interval,
    Resampling,
    Statistic,
    exp_mean,
    mean,
    quantile,
    share,
)
from numpy.typing import NDArray

LENGTHS: Final = (130, 64, 7, 200)


def once(statistic: Statistic, weights: Sequence[float]) -> float:
    """A statistic for one draw in which each token counts so often."""
    return float(statistic(np.array([weights], np.float64))[0])


def skewed(count: int, seed: int = 0) -> NDArray[np.float64]:
    """Values as KL has them: most small, few large."""
    return np.random.default_rng(seed).lognormal(-4, 1.5, count)


@pytest.mark.parametrize(
    ("level", "value"),
    # Of 1, 2, 3, 4: 2 is the smallest that half of them do not exceed.
    [(0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (0.99, 4), (1.0, 4)],
)
def test_a_quantile_is_the_smallest_value_that_enough_tokens_do_not_exceed(
    level: float, value: float
) -> None:
    assert once(quantile(np.array([3.0, 1.0, 4.0, 2.0]), level), [1, 1, 1, 1]) == value


def test_of_a_hundred_tokens_99_do_not_exceed_the_99th_percentile() -> None:
    values = np.random.default_rng(0).permutation(np.arange(1.0, 101.0))
    assert once(quantile(values, 0.99), [1] * 100) == 99
    assert once(quantile(values, 0.5), [1] * 100) == 50


@given(
    st.lists(
        st.tuples(st.floats(-50, 50), st.integers(0, 4), st.booleans(), st.booleans()),
        min_size=1,
        max_size=60,
    ).filter(lambda rows: any(times for _, times, *_ in rows)),
    st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.99, 1.0]),
)
def test_a_token_that_counts_twice_is_two_tokens(
    rows: list[tuple[float, int, bool, bool]], level: float
) -> None:
    values, times, hits, among = (np.array(column) for column in zip(*rows, strict=True))
    again = np.repeat(values, times)
    weights = times.tolist()
    assert once(quantile(values, level), weights) == np.quantile(
        again, level, method="inverted_cdf"
    )
    assert once(mean(values), weights) == pytest.approx(again.mean(), abs=1e-9)
    assert once(exp_mean(values / 10), weights) == pytest.approx(math.exp(again.mean() / 10))
    counted, right = np.repeat(among, times), np.repeat(hits & among, times)
    if counted.any():
        assert once(share(hits, among), weights) == pytest.approx(right.sum() / counted.sum())
    else:
        assert math.isnan(once(share(hits, among), weights))


def drawn(lengths: Sequence[int], seed: int = 0) -> NDArray[np.float64]:
    """How often each token counts in each draw, [draws, tokens]."""
    seen: list[NDArray[np.float64]] = []

    def look(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        seen.append(weights)
        return np.asarray(weights.sum(axis=1))

    Resampling(lengths, seed).interval(look)
    assert (seen[0] == 1).all()  # the value itself is of every token, once
    found: NDArray[np.float64] = np.concatenate(seen[1:])
    return found


def test_segments_are_drawn_whole_and_never_cross_sequences() -> None:
    weights = drawn(LENGTHS)
    assert weights.shape == (RESAMPLES, sum(LENGTHS))
    assert (weights == weights.round()).all()
    # Where a column differs from the one before, a segment begins: over 1,000 draws no two
    # segments are drawn equally often each time.
    changes = (weights[:, 1:] != weights[:, :-1]).any(axis=0)
    starts = [0, *(np.flatnonzero(changes) + 1), sum(LENGTHS)]
    assert set(np.cumsum(LENGTHS)) <= set(starts)
    sizes = np.diff(starts)
    assert sizes.tolist() == [44, 43, 43, 64, 7, 50, 50, 50, 50]
    assert sizes.max() <= SEGMENT
    # Each draw is of as many segments as there are.
    assert (weights[:, starts[:-1]].sum(axis=1) == len(sizes)).all()
    assert weights[:, 0].mean() == pytest.approx(1, abs=0.1)


def test_the_seed_makes_the_interval() -> None:
    values = skewed(sum(LENGTHS))
    first = Resampling(LENGTHS, 3).interval(mean(values))
    assert first == Resampling(LENGTHS, 3).interval(mean(values))
    other = Resampling(LENGTHS, 4).interval(mean(values))
    assert first.value == other.value == pytest.approx(values.mean())
    assert (first.low, first.high) != (other.low, other.high)


@settings(max_examples=25)
@given(st.integers(0, 200))
def test_the_value_lies_in_its_interval(seed: int) -> None:
    values = skewed(1000, seed)
    resampling = Resampling([500, 500], seed)
    for statistic in (mean(values), exp_mean(values), quantile(values, 0.5)):
        found = resampling.interval(statistic)
        assert found.low < found.value < found.high
    most = resampling.interval(quantile(values, 1.0))
    assert most.low <= most.value == most.high == values.max()


def test_the_tails_are_cut_at_two_and_a_half_percent() -> None:
    values = skewed(sum(LENGTHS))
    statistic = mean(values)
    means = np.sort(statistic(drawn(LENGTHS)))
    found = Resampling(LENGTHS).interval(statistic)
    assert ((found.low <= means) & (means <= found.high)).mean() == pytest.approx(
        CONFIDENCE, abs=2 / RESAMPLES
    )
    assert (means < found.low).mean() == pytest.approx((1 - CONFIDENCE) / 2, abs=2 / RESAMPLES)


@pytest.mark.parametrize("kin", [1, 8])
def test_about_95_of_100_intervals_hold_the_truth(kin: int) -> None:
    """Texts by chance, of tokens alone or of runs of kin that are equally hard for the model.

    Drawing single tokens again would hold the truth of the second kind in about 50 of 100.
    """
    lengths = [16] * 40  # each is one segment
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        values = np.repeat(rng.exponential(0.05, sum(lengths) // kin), kin)
        found = Resampling(lengths, seed).interval(mean(values))
        held += found.low <= 0.05 <= found.high
    # 190 are hoped for. 40 segments of a skewed kind make it some fewer, and the count itself is
    # off by 3 as one standard deviation.
    assert 176 <= held <= 198


def test_one_segment_says_nothing_of_other_texts() -> None:
    found = Resampling([SEGMENT]).interval(mean(skewed(SEGMENT)))
    assert [found.low, found.high] == pytest.approx([found.value] * 2, rel=1e-12)


def test_draws_without_a_value_do_not_count() -> None:
    """Only one of three sequences holds a token of the kind that is asked for."""
    among = np.arange(30) < 10
    hits = np.arange(30) < 4
    found = Resampling([10, 10, 10]).interval(share(hits, among))
    assert (found.value, found.low, found.high) == pytest.approx((0.4, 0.4, 0.4))
    nothing = Resampling([10, 10, 10]).interval(share(hits, among & False))
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()


def test_numbers_that_json_lacks_become_null() -> None:
    assert Interval(0.5, 0.25, 1.0).to_json() == {"value": 0.5, "low": 0.25, "high": 1.0}
    assert Interval(math.inf, 0.0, math.nan).to_json() == {"value": None, "low": 0.0, "high": None}
