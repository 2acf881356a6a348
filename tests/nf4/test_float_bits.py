"""Floats as bits: casts that round as torch does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nf4_pipeline.nf4.float_bits import bits_in, float32_of


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounds_as_torch_does(dtype: str) -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 100_000, np.uint64).astype(np.uint32)
    ties = (generator.integers(0, 2**16, 1000, np.uint64).astype(np.uint32) << 16) | 0x8000
    values = np.concatenate([bits, ties]).view(np.float32)
    found = float32_of(bits_in(values, dtype), dtype)
    expected = torch.from_numpy(values.copy()).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(found, expected)
