"""What the model card says of readers, and what verify therefore holds an artifact to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

FALCON_LINES: Final = """import torch
from transformers.models.falcon import modeling_falcon

modeling_falcon.FalconLinear = torch.nn.Linear
"""
"""Run before `from_pretrained`, they have transformers >= 5.5 take a Falcon's layers for 4 bit."""


def published_lines(model_class: str, hidden_modules: Sequence[str]) -> str | None:
    """The Python that the card asks users of transformers alone to run first.

    Args:
        model_class: the causal LM class.
        hidden_modules: quantized modules that stock transformers >= 5.5 passes over.

    Returns:
        None if there is nothing to run.
    """
    return FALCON_LINES if hidden_modules and model_class.startswith("Falcon") else None


def promised(model_class: str, hidden_modules: Sequence[str]) -> frozenset[str]:
    """The names of the readers that the card promises.

    Transformers alone is not promised for an architecture whose layers it passes over, unless the
    card publishes lines that change that.
    """
    stock = not hidden_modules or published_lines(model_class, hidden_modules) is not None
    return frozenset({"nf4_pipeline", "numpy"} | ({"transformers"} if stock else set()))
