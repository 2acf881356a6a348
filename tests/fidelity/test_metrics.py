"""KL, agreement and perplexity, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.fidelity.metrics import compare, is_right


def log(rows: list[list[float]]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.log(np.array(rows, np.float32))


def test_numbers_by_hand() -> None:
    reference = log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    model = log([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    found = compare(reference, model, np.array([0, 1]))
    kl = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert found.tokens == 2
    assert found.mean_kl == pytest.approx(kl / 2, rel=1e-5)
    assert found.max_kl == pytest.approx(kl, rel=1e-5)
    assert found.top1_agreement == 0.5
    assert found.reference_perplexity == pytest.approx((0.5 * 0.8) ** -0.5, rel=1e-5)
    assert found.perplexity == pytest.approx((0.25 * 0.8) ** -0.5, rel=1e-5)


def test_agreement_counts_apart_where_the_reference_is_sure() -> None:
    reference = log([[0.4, 0.3, 0.3], [0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    model = log([[0.3, 0.4, 0.3], [0.5, 0.3, 0.2], [0.3, 0.4, 0.3], [0.1, 0.1, 0.8]])
    found = compare(reference, model, np.array([0, 0, 0, 0]))
    assert found.top1_agreement == 0.5
    assert found.sure_tokens == 3
    assert found.sure_agreement == pytest.approx(2 / 3)


def test_a_model_equals_itself() -> None:
    dice = np.random.default_rng(0)
    scores = log(dice.dirichlet(np.ones(50), 20).tolist())
    found = compare(scores, scores, dice.integers(0, 50, 20))
    assert (found.mean_kl, found.max_kl, found.top1_agreement) == (0.0, 0.0, 1.0)
    assert found.perplexity == found.reference_perplexity > 1


def test_kl_is_of_the_reference_against_the_model() -> None:
    sure, unsure = log([[0.98, 0.01, 0.01]]), log([[0.4, 0.3, 0.3]])
    targets = np.array([0])
    there = compare(sure, unsure, targets).mean_kl
    back = compare(unsure, sure, targets).mean_kl
    assert there == pytest.approx(0.98 * math.log(0.98 / 0.4) + 0.02 * math.log(0.01 / 0.3), 1e-4)
    assert back > there


def test_the_report_is_plain_json() -> None:
    scores = log([[0.5, 0.5]])
    assert compare(scores, scores, np.array([1])).as_json() == {
        "tokens": 1,
        "mean_kl": 0.0,
        "max_kl": 0.0,
        "top1_agreement": 1.0,
        "sure_tokens": 0,
        "sure_agreement": 1.0,
        "reference_perplexity": pytest.approx(2.0),
        "perplexity": pytest.approx(2.0),
    }


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
