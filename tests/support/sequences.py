"""Short sequences of tokens on which two models are compared, and what is compared of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from nf4_pipeline.verification.eval_text import TokenSequence

LENGTHS: Final = (20, 33, 7, 20)
FIELDS: Final = ("kl", "agrees", "sure", "reference_nll", "nll")


def sequences(lengths: Sequence[int] = LENGTHS) -> list[TokenSequence]:
    """Random tokens of a vocabulary of 250; the same each time."""
    rng = np.random.default_rng(0)
    return [TokenSequence("any", rng.integers(0, 250, length)) for length in lengths]
