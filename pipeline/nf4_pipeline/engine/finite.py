"""Infinities and NaNs among copied values, found by their bits while they pass by."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_LAYOUTS: Final = {
    "BF16": (0x7FFF, 0x7F80),
    "F16": (0x7FFF, 0x7C00),
    "F32": (0x7FFF_FFFF, 0x7F80_0000),
    "F64": (0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
}
"""By dtype: the bits of a float but its sign, and those of its exponent. From an exponent of all
ones on, without the sign, a float is no number."""

_STEP: Final = 2**16
"""Elements at a time: they and their masked copy stay in the processor's cache."""


def first_not_finite(bits: NDArray[Any], dtype: str) -> int | None:
    """Where the first infinity or NaN stands.

    Args:
        bits: [n] unsigned integers of the dtype's width.
        dtype: of what they are the bits, as safetensors names it, such as "BF16".

    Returns:
        Its index in `bits`; None if there is none, or if the dtype has none.
    """
    if dtype not in _LAYOUTS:
        return None
    kind = bits.dtype.type
    without_sign, exponent = (kind(value) for value in _LAYOUTS[dtype])
    scratch = np.empty(min(_STEP, bits.size), bits.dtype)
    for start in range(0, bits.size, _STEP):
        part = bits[start : start + _STEP]
        masked = np.bitwise_and(part, without_sign, out=scratch[: part.size])
        if masked.max() >= exponent:
            return start + int(np.argmax(masked >= exponent))
    return None
