"""The six tensors that stand for one quantized weight, as bitsandbytes stores them.

W                                  uint8   [ceil(n / 2), 1]    two codes a byte
W.absmax                           uint8   [ceil(n / 64)]      8-bit scales
W.quant_map                        float32 [16]                the NF4 levels
W.nested_absmax                    float32 [ceil(blocks / 256)]
W.nested_quant_map                 float32 [256]               the levels of the scales
W.quant_state.bitsandbytes__nf4    uint8   [length of a JSON text]
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import Final

from nf4_pipeline.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE

QUANT_STATE_SUFFIX: Final = ".quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file: its name, safetensors dtype name, shape and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def blocks_of(weights: int) -> int:
    """How many blocks `weights` consecutive weights make."""
    return -(-weights // BLOCK_SIZE)


def quant_state_text(shape: tuple[int, ...], dtype: str, offset: float) -> bytes:
    """The JSON that tells readers how to dequantize.

    The offset is written in a fixed width that holds any float32 exactly, so the text's length does
    not depend on the weights, and every file's size and header are known before the work begins.

    Args:
        shape: of the weight.
        dtype: of the source, "bfloat16", "float16" or "float32".
        offset: the mean that double quantization took off; a float32 value.
    """
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK_SIZE,
        "dtype": dtype,
        "shape": list(shape),
        "nested_blocksize": NESTED_BLOCK_SIZE,
        "nested_dtype": "float32",
    }
    return f'{json.dumps(state)[:-1]}, "nested_offset": {float(offset): .16e}}}'.encode()


def stored_tensors(name: str, shape: tuple[int, ...], dtype: str) -> tuple[StoredTensor, ...]:
    """The six tensors of a weight.

    Args:
        name: the weight's name, "….weight".
        shape: [out_features, in_features].
        dtype: of the source, "bfloat16", "float16" or "float32".
    """
    weights = prod(shape)
    blocks = blocks_of(weights)
    nested = -(-blocks // NESTED_BLOCK_SIZE)
    packed = -(-weights // 2)
    text = len(quant_state_text(shape, dtype, 0.0))
    return (
        StoredTensor(name, "U8", (packed, 1), packed),
        StoredTensor(f"{name}.absmax", "U8", (blocks,), blocks),
        StoredTensor(f"{name}.quant_map", "F32", (16,), 64),
        StoredTensor(f"{name}.nested_absmax", "F32", (nested,), 4 * nested),
        StoredTensor(f"{name}.nested_quant_map", "F32", (256,), 1024),
        StoredTensor(f"{name}{QUANT_STATE_SUFFIX}", "U8", (text,), text),
    )
