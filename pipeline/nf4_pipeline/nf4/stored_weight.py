"""The six tensors that stand for one quantized weight, as bitsandbytes stores them.

    W                                  uint8   [ceil(n / 2), 1]    two codes a byte
    W.absmax                           uint8   [ceil(n / 64)]      8-bit scales
    W.quant_map                        float32 [16]                the NF4 levels
    W.nested_absmax                    float32 [ceil(blocks / 256)]
    W.nested_quant_map                 float32 [256]               the levels of the scales
    W.quant_state.bitsandbytes__nf4    uint8   [length of a JSON text]

This module alone knows them: what they will be before a byte is read (`stored_tensors`), what is
written (`companions`, `StoredWeight.tensors`) and how they are read back (`StoredWeight.read`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.checkpoint.layout import StoredTensor
from nf4_pipeline.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE
from nf4_pipeline.nf4.codebook import NF4_LEVELS, SCALE_LEVELS
from nf4_pipeline.nf4.dequantize import dequantize
from nf4_pipeline.nf4.double_quant import NestedScales, nested_blocks_of
from nf4_pipeline.nf4.packing import blocks_of, packed_bytes

QUANT_TYPE: Final = "nf4"
"""What bitsandbytes calls the codebook."""

_SCALES: Final = ".absmax"
_LEVELS: Final = ".quant_map"
_NESTED_SCALES: Final = ".nested_absmax"
_NESTED_LEVELS: Final = ".nested_quant_map"
_QUANT_STATE: Final = f".quant_state.bitsandbytes__{QUANT_TYPE}"


def stored_tensors(name: str, shape: tuple[int, ...], dtype: str) -> tuple[StoredTensor, ...]:
    """The six tensors of a weight, known before it is read: names, dtypes, shapes and bytes.

    Args:
        name: the weight's name, "….weight"; the codes are stored under it.
        shape: [out_features, in_features].
        dtype: of the source, "bfloat16", "float16" or "float32".

    Returns:
        The codes, and their five companions in the order in which they are written.
    """
    packed = packed_bytes(prod(shape))
    blocks = blocks_of(prod(shape))
    nested = nested_blocks_of(blocks)
    text = len(_quant_state(shape, dtype, 0.0))
    return (
        StoredTensor(name, "U8", (packed, 1), packed),
        StoredTensor(name + _SCALES, "U8", (blocks,), blocks),
        StoredTensor(name + _LEVELS, "F32", (16,), 64),
        StoredTensor(name + _NESTED_SCALES, "F32", (nested,), 4 * nested),
        StoredTensor(name + _NESTED_LEVELS, "F32", (256,), 1024),
        StoredTensor(name + _QUANT_STATE, "U8", (text,), text),
    )


def companions(
    name: str, shape: tuple[int, ...], dtype: str, scales: NestedScales
) -> dict[str, NDArray[Any]]:
    """What is stored beside the codes of a weight, in the order in which it is written.

    Args:
        name: the weight's name.
        shape: [out_features, in_features].
        dtype: of the source, "bfloat16", "float16" or "float32".
        scales: of all its blocks.

    Returns:
        Five arrays by their names; dtypes and shapes are those of `stored_tensors`.
    """
    text = _quant_state(shape, dtype, float(scales.offset))
    return {
        name + _SCALES: scales.codes,
        name + _LEVELS: NF4_LEVELS,
        name + _NESTED_SCALES: scales.absmax,
        name + _NESTED_LEVELS: SCALE_LEVELS,
        name + _QUANT_STATE: np.frombuffer(text, np.uint8),
    }


@dataclass(frozen=True)
class StoredWeight:
    """One quantized weight.

    Attributes:
        packed: two codes a byte, uint8 [ceil(n / 2)].
        scales: as they are stored.
        shape: [out_features, in_features], with a product of n.
        dtype: of the source, "bfloat16", "float16" or "float32".
    """

    packed: NDArray[np.uint8]
    scales: NestedScales
    shape: tuple[int, ...]
    dtype: str

    def tensors(self, name: str) -> dict[str, NDArray[Any]]:
        """The six arrays that are stored, by their names: codes first, then `companions`."""
        beside = companions(name, self.shape, self.dtype, self.scales)
        return {name: self.packed[:, None], **beside}

    @classmethod
    def read(cls, name: str, tensors: Mapping[str, NDArray[Any]]) -> StoredWeight:
        """The way back from the six arrays.

        Args:
            name: the weight's name.
            tensors: at least its own six, by name.

        Raises:
            KeyError: one of the six is missing, or the quant state lacks an entry.
            ValueError: the quant state is not JSON.
        """
        state = json.loads(tensors[name + _QUANT_STATE].tobytes())
        scales = NestedScales(
            tensors[name + _SCALES],
            tensors[name + _NESTED_SCALES],
            np.float32(state["nested_offset"]),
        )
        return cls(tensors[name].reshape(-1), scales, tuple(state["shape"]), state["dtype"])

    def dequantize(self) -> NDArray[np.float32]:
        """The weight that every reader computes, float32 [out_features, in_features]."""
        return dequantize(self.packed, self.scales.scales(), self.shape)


def _quant_state(shape: tuple[int, ...], dtype: str, offset: float) -> bytes:
    """The JSON that tells readers how to dequantize.

    The offset is written in a fixed width that holds any float32 exactly, so the text's length does
    not depend on the weights, and every file's size and header are known before the work begins.
    """
    state = {
        "quant_type": QUANT_TYPE,
        "blocksize": BLOCK_SIZE,
        "dtype": dtype,
        "shape": list(shape),
        "nested_blocksize": NESTED_BLOCK_SIZE,
        "nested_dtype": "float32",
    }
    return f'{json.dumps(state)[:-1]}, "nested_offset": {float(offset): .16e}}}'.encode()
