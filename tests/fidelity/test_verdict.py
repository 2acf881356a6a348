"""Measurements and thresholds -> checks -> a verdict."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import pytest
from nf4_pipeline.fidelity.bootstrap import Interval
from nf4_pipeline.fidelity.metrics import Fidelity
from nf4_pipeline.fidelity.verdict import Check, accuracy_check, fidelity_checks, verdict
from nf4_pipeline.recipe import VerifyRecipe

RECIPE: Final = VerifyRecipe(
    max_mean_kl=0.1, min_sure_agreement=0.8, max_perplexity_ratio=1.2, max_accuracy_drop=0.25
)


def at(value: float) -> Interval:
    return Interval(value, value - 0.01, value + 0.01)


GOOD: Final = Fidelity(
    tokens=100,
    sure_tokens=60,
    confidence=0.95,
    resamples=1000,
    segment=64,
    seed=0,
    mean_kl=at(0.05),
    median_kl=at(0.02),
    p99_kl=at(0.4),
    max_kl=at(0.5),
    top1_agreement=at(0.9),
    sure_agreement=at(0.95),
    perplexity_16bit=at(10.0),
    perplexity_4bit=at(11.0),
    perplexity_ratio=at(1.1),
)
KL, SURE, RATIO = range(3)


@pytest.mark.parametrize(
    ("fidelity", "failed"),
    [
        (GOOD, None),
        # The measured value counts, not what it could be on another text.
        (replace(GOOD, mean_kl=at(0.1), sure_agreement=at(0.8), perplexity_ratio=at(1.2)), None),
        (replace(GOOD, mean_kl=at(0.1001)), KL),
        (replace(GOOD, sure_agreement=at(0.7999)), SURE),
        (replace(GOOD, perplexity_ratio=at(1.2001)), RATIO),
        (replace(GOOD, perplexity_ratio=at(0.5)), None),
        # What else was measured is told, and fails nothing.
        (replace(GOOD, max_kl=at(50.0), top1_agreement=at(0.0)), None),
    ],
)
def test_limits(fidelity: Fidelity, failed: int | None) -> None:
    assert [check.passed for check in fidelity_checks(fidelity, RECIPE)] == [
        number != failed for number in (KL, SURE, RATIO)
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("stored", [False, True])
def test_what_is_not_finite_fails_every_check(bad: float, stored: bool) -> None:
    fidelity = replace(GOOD, mean_kl=at(bad), perplexity_ratio=at(bad), sure_agreement=at(math.nan))
    if stored:  # and read again: null fails as well
        fidelity = Fidelity.from_json(fidelity.to_json())
    assert [check.passed for check in fidelity_checks(fidelity, RECIPE)] == [False] * 3


def test_a_check_says_what_was_found_and_expected() -> None:
    kl, agreement, ratio = fidelity_checks(GOOD, RECIPE)
    assert kl.found == "0.0500 [0.0400, 0.0600] nats per token over 100 tokens"
    assert kl.expected == "at most 0.1"
    assert agreement.to_json() == {
        "name": "same next token where the 16-bit model is sure",
        "passed": True,
        "found": "95.0% of 60 tokens (90.0% of all 100)",
        "expected": "at least 80%",
    }
    assert ratio.found == "1.1000 [1.0900, 1.1100]: 11.000 over 10.000"
    assert ratio.expected == "at most 1.2"


def test_a_model_that_is_nowhere_sure_passes_and_says_so() -> None:
    _, agreement, _ = fidelity_checks(replace(GOOD, sure_tokens=0, sure_agreement=at(1)), RECIPE)
    assert agreement.passed
    assert agreement.found == "it is sure of none (90.0% of all 100)"


@pytest.mark.parametrize(
    ("right_16bit", "right_4bit", "passed"),
    [(4, 4, True), (4, 3, True), (4, 2, False), (0, 0, True), (0, 4, True)],
)
def test_right_answers(right_16bit: int, right_4bit: int, passed: bool) -> None:
    check = accuracy_check(4, right_16bit, right_4bit, RECIPE)
    assert check.passed is passed
    assert check.found == f"{right_4bit} of 4 in 4 bit, {right_16bit} of 4 in 16 bit"


def test_one_failed_check_fails_all() -> None:
    good, bad = Check("a", True, "", ""), Check("b", False, "", "")
    assert verdict([good, good]) == "pass"
    assert verdict([good, bad, good]) == "fail"
