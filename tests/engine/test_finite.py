"""Infinities and NaNs are found by their bits, in every dtype and at every place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nf4_pipeline.engine.finite import first_not_finite

DTYPES = {
    "BF16": (torch.bfloat16, torch.uint16),
    "F16": (torch.float16, torch.uint16),
    "F32": (torch.float32, torch.uint32),
    "F64": (torch.float64, torch.uint64),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1, 65_535, 65_536, 99_999])
def test_the_first_is_found(dtype: str, bad: float, place: int) -> None:
    kind, bits = DTYPES[dtype]
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).to(kind)
    assert first_not_finite(values.view(bits).numpy(), dtype) is None
    values[place:] = bad
    assert first_not_finite(values.view(bits).numpy(), dtype) == place


def test_the_largest_numbers_are_numbers() -> None:
    for dtype, (kind, bits) in DTYPES.items():
        limits = torch.finfo(kind)
        values = torch.tensor([limits.max, limits.min, limits.tiny, -0.0], dtype=kind)
        assert first_not_finite(values.view(bits).numpy(), dtype) is None


def test_integers_and_nothing_at_all() -> None:
    assert first_not_finite(np.full(4, 0xFFFF, np.uint16), "I16") is None
    assert first_not_finite(np.empty(0, np.uint16), "BF16") is None
