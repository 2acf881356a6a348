"""Measurements and thresholds -> checks -> a verdict."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.fidelity.metrics import Fidelity
from pipeline.fidelity.verdict import Check, accuracy_check, fidelity_checks, verdict
from pipeline.recipe import VerifyRecipe

RECIPE = VerifyRecipe(max_mean_kl=0.1, min_sure_agreement=0.8, max_accuracy_drop=0.25)
GOOD = Fidelity(100, 0.05, 0.5, 0.9, 60, 0.95, 10.0, 11.0)


@pytest.mark.parametrize(
    ("fidelity", "passed"),
    [
        (GOOD, [True, True]),
        (replace(GOOD, mean_kl=0.1, sure_agreement=0.8), [True, True]),
        (replace(GOOD, mean_kl=0.1001), [False, True]),
        (replace(GOOD, sure_agreement=0.7999), [True, False]),
        (replace(GOOD, mean_kl=float("nan"), sure_agreement=float("nan")), [False, False]),
    ],
)
def test_limits(fidelity: Fidelity, passed: list[bool]) -> None:
    assert [check.passed for check in fidelity_checks(fidelity, RECIPE)] == passed


def test_a_check_says_what_was_found_and_expected() -> None:
    kl, agreement = fidelity_checks(GOOD, RECIPE)
    assert kl.found == "0.0500 nats per token over 100 tokens"
    assert kl.expected == "at most 0.1"
    assert agreement.as_json() == {
        "name": "same next token where the 16-bit model is sure",
        "passed": True,
        "found": "95.0% of 60 tokens (90.0% of all 100)",
        "expected": "at least 80%",
    }


@pytest.mark.parametrize(
    ("before", "after", "passed"),
    [
        ([True] * 4, [True] * 4, True),
        ([True] * 4, [True] * 3 + [False], True),
        ([True] * 4, [True] * 2 + [False] * 2, False),
        ([False] * 4, [False] * 4, True),
        ([False] * 4, [True] * 4, True),
        # One lost and another gained: what counts is how many are right.
        ([True, False], [False, True], True),
    ],
)
def test_right_answers(before: list[bool], after: list[bool], passed: bool) -> None:
    check = accuracy_check(before, after, RECIPE)
    assert check is not None
    assert check.passed is passed
    assert f"{sum(after)} of {len(after)} in 4 bit" in check.found


def test_no_expected_answers_no_check() -> None:
    assert accuracy_check([], [], RECIPE) is None


def test_one_failed_check_fails_all() -> None:
    good, bad = Check("a", True, "", ""), Check("b", False, "", "")
    assert verdict([good, good]) == "pass"
    assert verdict([good, bad, good]) == "fail"
