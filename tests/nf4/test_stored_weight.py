"""The six stored tensors, against what bitsandbytes itself would store."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from bitsandbytes import functional as stock
from hypothesis import example, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from nf4_pipeline.nf4.double_quant import NestedScales
from nf4_pipeline.nf4.float_bits import bits_of
from nf4_pipeline.nf4.packing import blocks_of
from nf4_pipeline.nf4.rtn import round_to_nearest
from nf4_pipeline.nf4.stored_weight import StoredWeight, companions, stored_tensors

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KEY = "quant_state.bitsandbytes__nf4"
QUANT_STATE_SUFFIX = f".{KEY}"
KINDS = {torch.uint8: "U8", torch.float32: "F32"}


def quant_state_text(shape: tuple[int, ...], dtype: str, offset: float) -> bytes:
    """What is stored as the quant state of a weight with this offset."""
    scales = NestedScales(np.zeros(1, np.uint8), np.zeros(1, np.float32), np.float32(offset))
    return bytes(companions("w", shape, dtype, scales)["w" + QUANT_STATE_SUFFIX])


LENGTH = len(quant_state_text((7, 9), "float32", 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 21), (64, 64), (65, 129), (16, 2048), (4672, 64)])
def test_names_types_shapes_and_bytes_are_stock(dtype: str, shape: tuple[int, int]) -> None:
    dice = torch.Generator().manual_seed(1)
    weights = torch.randn(shape, generator=dice).to(DTYPES[dtype])
    packed, state = stock.quantize_4bit(
        weights, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    expected = {"w": packed} | {
        f"w.{key}": value for key, value in state.as_dict(packed=True).items()
    }
    found = {tensor.name: tensor for tensor in stored_tensors("w", shape, dtype)}
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        if name.endswith(QUANT_STATE_SUFFIX):
            # Ours has one length for any offset; stock's depends on the digits.
            assert found[name].shape == (found[name].nbytes,)
            assert found[name].dtype == "U8"
            continue
        assert found[name].shape == tuple(tensor.shape), name
        assert found[name].dtype == KINDS[tensor.dtype], name
        assert found[name].nbytes == tensor.nbytes, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_quant_state_says_what_bitsandbytes_says(dtype: str) -> None:
    weights = torch.linspace(-1, 1, 48 * 96).reshape(48, 96).to(DTYPES[dtype])
    _, state = stock.quantize_4bit(
        weights, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    expected = json.loads(state.as_dict(packed=True)[KEY].numpy().tobytes())
    found = json.loads(quant_state_text((48, 96), dtype, state.offset.item()))
    assert found == expected
    assert list(found) == list(expected)


def test_bitsandbytes_reads_the_quant_state() -> None:
    weights = torch.linspace(-1, 1, 48 * 96).reshape(48, 96).to(torch.bfloat16)
    packed, state = stock.quantize_4bit(
        weights, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    parts = state.as_dict(packed=True)
    text = quant_state_text((48, 96), "bfloat16", state.offset.item())
    parts[KEY] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    read = stock.QuantState.from_dict({f"w.{k}": v for k, v in parts.items()}, torch.device("cpu"))
    assert read.offset.item() == state.offset.item()
    assert torch.equal(stock.dequantize_4bit(packed, read), stock.dequantize_4bit(packed, state))


def test_the_quant_state_comes_last() -> None:
    names = [tensor.name for tensor in stored_tensors("a.weight", (2, 3), "float16")]
    assert names[0] == "a.weight"
    assert names[-1] == "a.weight" + QUANT_STATE_SUFFIX


@given(st.floats(allow_infinity=False, allow_nan=False, width=32))
@example(0.0)
@example(float(np.finfo(np.float32).max))
@example(float(np.finfo(np.float32).min))
@example(float(np.finfo(np.float32).tiny))
@example(float(np.finfo(np.float32).smallest_subnormal))
@limits(max_examples=1000)
def test_the_text_has_one_length_and_the_exact_offset(value: float) -> None:
    text = quant_state_text((7, 9), "float32", value)
    assert len(text) == LENGTH
    assert np.float64(json.loads(text)["nested_offset"]).tobytes() == np.float64(value).tobytes()


def test_the_planned_length_is_the_length() -> None:
    for shape in ((1, 1), (4672, 64), (65024, 4544)):
        planned = stored_tensors("w", shape, "bfloat16")[-1]
        assert planned.nbytes == len(quant_state_text(shape, "bfloat16", 0.0123))


@pytest.mark.parametrize(("weights", "blocks"), [(1, 1), (63, 1), (64, 1), (65, 2), (128, 2)])
def test_blocks(weights: int, blocks: int) -> None:
    assert blocks_of(weights) == blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 21), (64, 64), (65, 129), (16, 2048)])
def test_what_is_written_is_what_was_predicted_and_is_read_back(
    dtype: str, shape: tuple[int, int]
) -> None:
    dice = torch.Generator().manual_seed(shape[0])
    weight = round_to_nearest(bits_of(torch.randn(shape, generator=dice).to(DTYPES[dtype])), dtype)
    tensors = weight.tensors("a.weight")
    predicted = stored_tensors("a.weight", shape, dtype)
    assert list(tensors) == [tensor.name for tensor in predicted]
    kinds = {"U8": np.uint8, "F32": np.float32}
    for tensor in predicted:
        found = tensors[tensor.name]
        assert (found.shape, found.nbytes) == (tensor.shape, tensor.nbytes)
        assert found.dtype == kinds[tensor.dtype]
    again = StoredWeight.read("a.weight", tensors)
    assert (again.shape, again.dtype) == (shape, dtype)
    assert again.scales.offset == weight.scales.offset
    assert again.dequantize().tobytes() == weight.dequantize().tobytes()
