"""Weights, and Hessians of inputs, for whatever quantizes with GPTQ."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def hessian_of(columns: int, tokens: int = 1000, seed: int = 0) -> torch.Tensor:
    """The Hessian of inputs that are correlated, and of very different size."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(columns, columns)) / np.sqrt(columns) + np.eye(columns)
    x = rng.normal(size=(tokens, columns)) @ mix * np.exp(rng.normal(size=columns))
    return torch.from_numpy(x.T @ x / tokens).float()


def weight_of(rows: int, columns: int, dtype: str = "bfloat16", seed: int = 1) -> torch.Tensor:
    """A weight whose rows differ in size, and that is not symmetric: a scale's sign matters."""
    rng = np.random.default_rng(seed)
    values = rng.gumbel(size=(rows, columns)) * np.exp(rng.normal(size=(rows, 1))) * 0.05
    return torch.from_numpy(values).to(DTYPES[dtype])
