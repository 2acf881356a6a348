"""The way back, held against bitsandbytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bitsandbytes import functional as stock
from nf4_pipeline.nf4.dequantize import dequantize, dequantize_on
from nf4_pipeline.nf4.packing import unpack


@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (4, 16), (5, 13), (64, 64), (33, 127)])
def test_values_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    dice = torch.Generator().manual_seed(shape[1])
    weights = torch.randn(shape, generator=dice)
    packed, state = stock.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    expected = stock.dequantize_4bit(packed, state)
    found = dequantize(packed.numpy(), state.absmax.numpy(), shape)
    assert found.shape == shape
    assert found.dtype == np.float32
    assert found.tobytes() == expected.numpy().tobytes()
    on_torch = dequantize_on(torch.device("cpu"), packed.numpy(), state.absmax.numpy(), shape)
    assert on_torch.numpy().tobytes() == found.tobytes()


def test_unpack_takes_the_high_half_first_and_drops_the_padding() -> None:
    packed = np.array([[0x1F], [0xA7]], np.uint8)
    assert unpack(packed, 4).tolist() == [1, 15, 10, 7]
    assert unpack(packed, 3).tolist() == [1, 15, 10]


def test_an_error_in_one_code_is_seen() -> None:
    weights = torch.linspace(-1, 1, 64)
    packed, state = stock.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    before = dequantize(packed.numpy(), state.absmax.numpy(), (64,))
    packed[3, 0] ^= 0x01
    after = dequantize(packed.numpy(), state.absmax.numpy(), (64,))
    assert np.flatnonzero(before != after).tolist() == [7]
