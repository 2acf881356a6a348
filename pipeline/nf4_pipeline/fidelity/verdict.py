"""Measurements and thresholds -> checks -> a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nf4_pipeline.documents import Document
from nf4_pipeline.fidelity.metrics import Fidelity
from nf4_pipeline.recipe import VerifyRecipe

Verdict = Literal["pass", "fail"]


@dataclass(frozen=True, slots=True)
class Check(Document):
    """One thing that must hold.

    Attributes:
        name: what is checked.
        passed: whether it holds.
        found: what was measured, in words.
        expected: what must be, in words.
    """

    name: str
    passed: bool
    found: str
    expected: str


def fidelity_checks(fidelity: Fidelity, recipe: VerifyRecipe) -> list[Check]:
    """Holds the distance from the 16-bit model against the recipe's limits."""
    kl, agreement = fidelity.mean_kl, fidelity.sure_agreement
    ratio = fidelity.perplexity_ratio
    sure = f"{agreement.value:.1%} of {fidelity.sure_tokens} tokens"
    if not fidelity.sure_tokens:
        sure = "it is sure of none"
    return [
        Check(
            "mean KL from the 16-bit model",
            kl.value <= recipe.max_mean_kl,
            f"{kl:.4f} nats per token over {fidelity.tokens} tokens",
            f"at most {recipe.max_mean_kl:g}",
        ),
        Check(
            "same next token where the 16-bit model is sure",
            agreement.value >= recipe.min_sure_agreement,
            f"{sure} ({fidelity.top1_agreement.value:.1%} of all {fidelity.tokens})",
            f"at least {recipe.min_sure_agreement:.0%}",
        ),
        Check(
            "perplexity in 4 bit over 16 bit",
            ratio.value <= recipe.max_perplexity_ratio,
            f"{ratio:.4f}: {fidelity.perplexity_4bit.value:.3f} over "
            f"{fidelity.perplexity_16bit.value:.3f}",
            f"at most {recipe.max_perplexity_ratio:g}",
        ),
    ]


def accuracy_check(asked: int, right_16bit: int, right_4bit: int, recipe: VerifyRecipe) -> Check:
    """Holds the right answers of both models against each other.

    Args:
        asked: questions with one right answer; at least one.
        right_16bit: how many the reference answered so.
        right_4bit: how many the model did.
        recipe: the limits.
    """
    return Check(
        "right answers",
        (right_16bit - right_4bit) / asked <= recipe.max_accuracy_drop,
        f"{right_4bit} of {asked} in 4 bit, {right_16bit} of {asked} in 16 bit",
        f"at most {recipe.max_accuracy_drop:.0%} of the questions lost",
    )


def verdict(checks: Sequence[Check]) -> Verdict:
    """ "pass" if every check passed."""
    return "pass" if all(check.passed for check in checks) else "fail"
