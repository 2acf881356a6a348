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

import numpy as np

from pipeline.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE

QUANT_STATE_SUFFIX: Final = ".quant_state.bitsandbytes__nf4"

QUANT_STATE_SLACK: Final = 22
"""Most bytes by which two quant-state texts of one weight differ: the digits of the offset.

A non-negative float32 printed as the shortest float64 takes 3 ("0.0") to 25 characters.
"""

_LONGEST_OFFSET: Final = 3 + QUANT_STATE_SLACK


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


def quant_state_text(shape: tuple[int, ...], dtype: str, offset: np.float32 | None) -> bytes:
    """The JSON that tells readers how to dequantize; `None` stands for the longest offset."""
    state: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": BLOCK_SIZE,
        "dtype": dtype,
        "shape": list(shape),
        "nested_blocksize": NESTED_BLOCK_SIZE,
        "nested_dtype": "float32",
        "nested_offset": 0.0 if offset is None else float(offset),
    }
    text = json.dumps(state).encode()
    return text + b" " * (_LONGEST_OFFSET - 3) if offset is None else text


def stored_tensors(name: str, shape: tuple[int, ...], dtype: str) -> tuple[StoredTensor, ...]:
    """The six tensors of a weight, the quant state (last) at its longest.

    Args:
        name: the weight's name, "….weight".
        shape: [out_features, in_features].
        dtype: of the source, "bfloat16", "float16" or "float32".
    """
    weights = prod(shape)
    blocks = blocks_of(weights)
    nested = -(-blocks // NESTED_BLOCK_SIZE)
    packed = -(-weights // 2)
    text = len(quant_state_text(shape, dtype, None))
    return (
        StoredTensor(name, "U8", (packed, 1), packed),
        StoredTensor(f"{name}.absmax", "U8", (blocks,), blocks),
        StoredTensor(f"{name}.quant_map", "F32", (16,), 64),
        StoredTensor(f"{name}.nested_absmax", "F32", (nested,), 4 * nested),
        StoredTensor(f"{name}.nested_quant_map", "F32", (256,), 1024),
        StoredTensor(f"{name}{QUANT_STATE_SUFFIX}", "U8", (text,), text),
    )
