"""KL, agreement, perplexity and the rest, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import astuple, replace
from itertools import pairwise
from typing import Any, Final

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.documents import Document
from nf4_pipeline.fidelity.bootstrap import Interval
from nf4_pipeline.fidelity.metrics import (
    Difference,
    DomainRatio,
    Fidelity,
    by_domain,
    by_position,
    compare,
    difference,
    histogram,
    is_right,
)
from nf4_pipeline.fidelity.token_scores import TokenScores
from nf4_pipeline.verification.document import SCHEMA
from numpy.typing import NDArray

FIGURES: Final = (
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


def scores(
    kl: Sequence[float] | NDArray[np.float64],
    *,
    agrees: Sequence[bool] | None = None,
    sure: Sequence[bool] | None = None,
    reference_nll: Sequence[float] | NDArray[np.float64] | None = None,
    nll: Sequence[float] | NDArray[np.float64] | None = None,
) -> TokenScores:
    """Scores with these KL; the rest is as of two equal models unless it is given."""
    count = len(kl)
    before = np.full(count, 1.0) if reference_nll is None else np.array(reference_nll)
    return TokenScores(
        kl=np.asarray(kl, np.float64),
        agrees=np.ones(count, np.bool_) if agrees is None else np.array(agrees),
        sure=np.ones(count, np.bool_) if sure is None else np.array(sure),
        reference_nll=before,
        nll=before if nll is None else np.array(nll),
    )


def by_chance(count: int, seed: int = 0) -> TokenScores:
    rng = np.random.default_rng(seed)
    return TokenScores(
        kl=rng.lognormal(-4, 2, count),
        agrees=rng.random(count) < 0.8,
        sure=rng.random(count) < 0.6,
        reference_nll=rng.exponential(2, count),
        nll=rng.exponential(2.1, count),
    )


def values(fidelity: Fidelity) -> dict[str, float]:
    return {name: getattr(fidelity, name).value for name in FIGURES}


def test_numbers_by_hand() -> None:
    found = compare(
        scores(
            [0.1, 0.0, 0.3, 0.4],
            agrees=[True, True, False, False],
            sure=[True, False, True, True],
            reference_nll=[math.log(2), math.log(8), 0.0, 0.0],
            nll=[math.log(4), math.log(8), math.log(8), 0.0],
        ),
        [3, 1],
    )
    assert (found.tokens, found.sure_tokens, found.seed) == (4, 3, 0)
    assert values(found) == pytest.approx(
        {
            "mean_kl": 0.2,
            "median_kl": 0.1,
            "p99_kl": 0.4,
            "max_kl": 0.4,
            "top1_agreement": 0.5,
            "sure_agreement": 1 / 3,
            "perplexity_16bit": 2.0,  # the fourth root of 2 * 8
            "perplexity_4bit": 4.0,  # of 4 * 8 * 8
            "perplexity_ratio": 2.0,
        }
    )


def test_a_model_that_equals_its_reference() -> None:
    found = compare(scores(np.zeros(1000)), [400, 600])
    expected = {**dict.fromkeys(FIGURES[:4], 0.0), **dict.fromkeys(FIGURES[4:6], 1.0)}
    for name, value in expected.items():
        interval = getattr(found, name)
        assert (interval.value, interval.low, interval.high) == (value, value, value), name
    ratio = found.perplexity_ratio
    assert (ratio.value, ratio.low, ratio.high) == (1.0, 1.0, 1.0)


def test_the_ratio_of_perplexities_is_paired() -> None:
    """Both rise and fall with the text; every token costs 4 bits the same."""
    hard = np.random.default_rng(0).exponential(2, 2000)
    found = compare(scores(np.zeros(2000), reference_nll=hard, nll=hard + 0.01), [500] * 4)
    assert found.perplexity_16bit.high > 1.05 * found.perplexity_16bit.low
    ratio = found.perplexity_ratio
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx([math.exp(0.01)] * 3)


def test_the_seed_makes_the_intervals() -> None:
    some = by_chance(900)
    first, again, other = (compare(some, [450, 450], seed) for seed in (1, 1, 2))
    assert first == again
    assert values(first) == values(other)
    assert (first.seed, other.seed) == (1, 2)
    assert first.mean_kl != other.mean_kl


def test_values_lie_in_their_intervals() -> None:
    found = compare(by_chance(4000), [500] * 8)
    for name in FIGURES:
        interval = getattr(found, name)
        assert interval.low <= interval.value <= interval.high, name
    # The maximum of other tokens of this text is none that this text does not have.
    assert found.max_kl.high == found.max_kl.value


def test_nowhere_sure() -> None:
    found = compare(scores([0.1, 0.2], sure=[False, False]), [2])
    assert found.sure_tokens == 0
    assert found.sure_agreement.to_json() == {"value": 1.0, "low": 1.0, "high": 1.0}


def schema_of(part: str) -> dict[str, Any]:
    schema = json.loads(SCHEMA.read_text("utf-8"))
    return {"$ref": f"#/$defs/{part}", "$defs": schema["$defs"]}


def through_json(document: Document) -> Any:
    """Keys in another order, as another program may write them; nothing that JSON lacks."""
    return json.loads(json.dumps(document.to_json(), sort_keys=True, allow_nan=False))


def test_json_and_back() -> None:
    found = compare(by_chance(500), [100, 400], seed=5)
    value = through_json(found)
    jsonschema.validate(value, schema_of("fidelity"))
    assert Fidelity.from_json(value) == found


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_null(bad: float) -> None:
    kl = np.full(200, 0.01)
    kl[7] = bad
    nll = np.full(200, 1.0)
    nll[7] = bad
    value = through_json(compare(scores(kl, nll=nll), [100, 100]))
    jsonschema.validate(value, schema_of("fidelity"))
    for name in ("mean_kl", "max_kl", "perplexity_4bit", "perplexity_ratio"):
        assert value[name]["value"] is None, name
    assert value["median_kl"]["value"] == 0.01  # one token of 200 does not hide the others
    assert value["perplexity_16bit"]["value"] == pytest.approx(math.e)
    back = Fidelity.from_json(value)
    assert math.isnan(back.mean_kl.value)
    assert back.median_kl.value == 0.01


def test_a_perplexity_beyond_all_numbers_is_null() -> None:
    value = compare(scores([1.0] * 3, nll=[5000.0] * 3), [3]).to_json()
    assert value["perplexity_4bit"] == {"value": None, "low": None, "high": None}


def test_by_domain() -> None:
    lengths = [70, 30, 50, 10]
    domains = ["prose", "code", "prose", "code"]
    some = by_chance(160)
    prose, code = by_domain(some, lengths, domains)
    assert (prose.name, code.name) == ("prose", "code")
    assert (prose.tokens, code.tokens) == (120, 40)
    of_code = np.r_[70:100, 150:160]
    assert code.mean_kl.value == pytest.approx(some.kl[of_code].mean())
    assert code.top1_agreement.value == pytest.approx(some.agrees[of_code].mean())
    assert code.perplexity_16bit == pytest.approx(math.exp(some.reference_nll[of_code].mean()))
    assert code.perplexity_4bit == pytest.approx(math.exp(some.nll[of_code].mean()))
    jsonschema.validate([through_json(prose), through_json(code)], schema_of("domains"))
    everything = compare(some, lengths)
    weighted = (120 * prose.mean_kl.value + 40 * code.mean_kl.value) / 160
    assert everything.mean_kl.value == pytest.approx(weighted)


@given(st.lists(st.integers(1, 150), min_size=1, max_size=8))
def test_by_position_counts_every_token_once(lengths: list[int]) -> None:
    total = sum(lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    parts = by_position(scores(positions.astype(np.float64)), lengths)
    assert sum(part.tokens for part in parts) == total
    assert len(parts) <= 32
    assert (parts[0].first, parts[-1].last) == (0, max(lengths) - 1)
    for before, after in pairwise(parts):
        assert after.first == before.last + 1
    for part in parts:  # KL is the position here, so a mean says which tokens were counted
        inside = positions[(positions >= part.first) & (positions <= part.last)]
        assert part.tokens == len(inside)
        assert part.mean_kl == pytest.approx(inside.mean())


def test_a_position_that_is_not_finite_is_null() -> None:
    first, second = by_position(scores([math.inf, 0.5]), [2])
    assert (first.mean_kl, second.mean_kl) == (None, 0.5)


@given(
    st.lists(
        st.one_of(
            st.sampled_from([0.0, 1e-300, 1e-7, 10.0, 1e300, math.inf]),
            st.floats(0, 100, allow_subnormal=False),
        ),
        min_size=1,
        max_size=100,
    )
)
def test_the_histogram_holds_every_token(kl: list[float]) -> None:
    found = through_json(histogram(scores(kl)))
    edges, counts = found["edges"], found["counts"]
    assert sum(counts) == len(kl)
    assert len(edges) == len(counts) + 1
    assert all(low < high for low, high in pairwise(edges))
    assert counts[0] >= sum(value < edges[1] * 0.999 for value in kl)
    assert counts[-1] >= sum(value > edges[-2] * 1.001 for value in kl)


def test_a_histogram_by_hand() -> None:
    found = histogram(scores([0.0, 1e-9, 0.02, 0.04, 0.05, 4.0, 9.0, 1e9]))
    edges, counts = found.edges, found.counts
    assert (edges[0], edges[-1]) == (1e-7, 10.0)
    assert edges[-2] == pytest.approx(10**0.75, rel=1e-3)  # four bins a decade
    assert (counts[0], counts[-2], counts[-1]) == (2, 1, 2)
    filled = [(round(math.log10(edges[i]), 2), n) for i, n in enumerate(counts) if n]
    assert filled == [(-7, 2), (-1.75, 1), (-1.5, 2), (0.5, 1), (0.75, 2)]


def test_two_equal_models_do_not_differ() -> None:
    some = by_chance(600)
    found = difference(some, replace(some, kl=some.kl.copy()), [300, 300], ["a", "b"])
    one = Interval(1.0, 1.0, 1.0)
    assert found == Difference(
        mean_kl=Interval(0.0, 0.0, 0.0),
        mean_kl_ratio=one,
        domains=tuple(DomainRatio(name=name, mean_kl_ratio=one) for name in ("a", "b")),
    )


def test_the_difference_is_paired_and_has_a_direction() -> None:
    """The text makes both KL rise and fall by far more than the one is above the other."""
    better = by_chance(2000)
    worse = replace(better, kl=better.kl * 1.05)
    lengths = [500] * 4
    found = difference(worse, better, lengths, ["a"] * 4)
    mean = better.kl.mean()
    assert found.mean_kl.value == pytest.approx(0.05 * mean)
    assert astuple(found.mean_kl_ratio) == pytest.approx((1.05,) * 3)
    assert 0 < found.mean_kl.low < found.mean_kl.value < found.mean_kl.high
    assert compare(worse, lengths).mean_kl.low < mean  # unpaired, one could not tell
    back = difference(better, worse, lengths, ["a"] * 4)
    assert back.mean_kl.value == pytest.approx(-0.05 * mean)
    assert back.mean_kl_ratio.value == pytest.approx(1 / 1.05)


def test_each_domain_has_a_ratio_of_its_own() -> None:
    """As if its sequences were all there is, however they lie among the others."""
    lengths, domains = [300, 200, 300, 100], ["a", "b", "a", "b"]
    one, other = by_chance(900), replace(by_chance(900), kl=by_chance(900).kl[::-1].copy())
    found = difference(one, other, lengths, domains)
    assert [part.name for part in found.domains] == ["a", "b"]
    for part, name, own in zip(found.domains, "ab", ([300, 300], [200, 100]), strict=True):
        chosen = np.repeat(domains, lengths) == name
        first, second = scores(one.kl[chosen]), scores(other.kl[chosen])
        alone = difference(first, second, own, ["x", "x"])
        ratio = part.mean_kl_ratio
        assert ratio == alone.mean_kl_ratio
        assert ratio.value == pytest.approx(first.kl.mean() / second.kl.mean())
        assert ratio.low < ratio.value < ratio.high


def test_the_interval_of_a_ratio_draws_the_same_segments_of_both() -> None:
    """Two models that err on the same words: their ratio is far better known than either."""
    lengths = [500] * 4
    better = by_chance(2000)
    rng = np.random.default_rng(1)
    worse = replace(better, kl=better.kl * rng.uniform(1.9, 2.1, 2000))
    found = difference(worse, better, lengths, ["a"] * 4).mean_kl_ratio
    assert 1.9 < found.low < found.value < found.high < 2.1
    alone = compare(worse, lengths).mean_kl
    assert (alone.high - alone.low) / alone.value > 3 * (found.high - found.low) / 2


def test_nothing_over_nothing_is_null() -> None:
    nothing = scores(np.zeros(50))
    found = through_json(difference(nothing, nothing, [50], ["a"]))
    assert found["mean_kl"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["mean_kl_ratio"] == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("Paris", "Paris", True),
        (" paris.\n", "Paris", True),
        ("\n\nParis\nLondon", "Paris", True),
        ("Paris, France", "Paris", False),
        ("", "Paris", False),
        ("   \n ", "Paris", False),
        ("42", "42.", True),
        ("straße", "STRASSE", True),
        ("Not Paris", "Paris", False),
    ],
)
def test_is_right(answer: str, expected: str, right: bool) -> None:
    assert is_right(answer, expected) is right
