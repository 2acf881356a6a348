"""Infinities and NaNs among copied values, found by their bits while they pass by."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.compiled import compiled

_LAYOUTS: Final = {
    "BF16": (0x7FFF, 0x7F80),
    "F16": (0x7FFF, 0x7C00),
    "F32": (0x7FFF_FFFF, 0x7F80_0000),
    "F64": (0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
}
"""By dtype: the bits of a float but its sign, and those of its exponent. From an exponent of all
ones on, without the sign, a float is no number."""


@compiled()
def _largest(bits, without_sign):  # type: ignore[no-untyped-def]
    """The largest of some bits but their sign; LLVM makes a loop of vectors of it."""
    largest = bits[0] & without_sign
    for i in range(bits.size):
        largest = max(largest, bits[i] & without_sign)
    return largest


def first_not_finite(bits: NDArray[Any], dtype: str) -> int | None:
    """Where the first infinity or NaN stands.

    Args:
        bits: [n] unsigned integers of the dtype's width.
        dtype: of what they are the bits, as safetensors names it, such as "BF16".

    Returns:
        Its index in `bits`; None if there is none, or if the dtype has none.
    """
    if dtype not in _LAYOUTS or bits.size == 0:
        return None
    kind = bits.dtype.type
    without_sign, exponent = (kind(value) for value in _LAYOUTS[dtype])
    if _largest(bits, without_sign) < exponent:
        return None
    return int(np.argmax(np.bitwise_and(bits, without_sign) >= exponent))
