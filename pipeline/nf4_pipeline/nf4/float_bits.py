"""Floats as the unsigned integers of their bits, which is what the kernels read.

NumPy has no bfloat16, so weights travel as bits and the name of their dtype: "bfloat16", "float16"
or "float32". torch is imported only where a tensor of its own comes in or goes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


def dtype_name(values: torch.Tensor) -> str:
    """What the dtype of a tensor is called, such as "bfloat16"."""
    return str(values.dtype).removeprefix("torch.")


def bits_of(values: torch.Tensor) -> NDArray[Any]:
    """The bits of a tensor of floats, on any device, as an array of its shape.

    Returns:
        uint16 for bfloat16 and float16, uint32 for float32; the tensor's own memory where it lies
        row after row on the CPU.
    """
    import torch

    unsigned = torch.uint32 if values.itemsize == 4 else torch.uint16
    bits: NDArray[Any] = values.detach().cpu().contiguous().view(unsigned).numpy()
    return bits


def tensor_of(bits: NDArray[Any], dtype: str) -> torch.Tensor:
    """The way back, [n]; shares memory with the bits."""
    import torch

    values: torch.Tensor = torch.from_numpy(bits.view(np.uint8)).view(getattr(torch, dtype))
    return values


def float32_of(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """The floats that bits stand for, in float32, exact."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16 if dtype == "float16" else np.float32).astype(np.float32)


def bits_in(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """The bits of float32 values in a dtype, rounded to the nearest, ties to even, as torch does.

    Returns:
        uint16 for "bfloat16" and "float16", uint32 for "float32".
    """
    if dtype == "float32":
        return values.view(np.uint32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0  # the carry could make an infinity of it
    return rounded
