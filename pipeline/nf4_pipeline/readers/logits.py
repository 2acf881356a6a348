"""The few tokens that every reader is asked, and how far two answers are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.readers import stock_reader

BOUNDS: Final = {"bfloat16": 0.02, "float16": 0.005, "float32": 1e-4}
"""How far two right programs may be apart that compute in a dtype; seen: 0, in one environment."""


def write_logits(model: Any, path: Path) -> None:
    """Leaves the logits of the fixed tokens in a file, as the stock reader leaves its own.

    Args:
        model: a causal LM in eval mode.
        path: .npy; float32 [texts, length, vocabulary].
    """
    stock_reader.write_logits(model, str(path))


def distance(found: Path, expected: Path) -> float | None:
    """sqrt(sum (found - expected)^2 / sum expected^2) of two files of logits.

    Returns:
        None if their shapes differ or one holds a number that is not finite.
    """
    one, other = (np.load(path).astype(np.float64) for path in (found, expected))
    if one.shape != other.shape or not (_finite(one) and _finite(other)):
        return None
    scale = float(np.linalg.norm(other))
    apart = float(np.linalg.norm(one - other))
    return apart / scale if scale else (0.0 if apart == 0 else None)


def _finite(values: NDArray[np.float64]) -> bool:
    return bool(np.isfinite(values).all())
