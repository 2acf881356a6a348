"""The search for the nearest level, for compiled CPU kernels: a level is the number of midpoints
below a value, and each comparison gives one bit of it.

Numba puts these into the loops that call them. Its cache of a kernel does not know of a change
here: after one, delete the `__pycache__` of `nf4/` and `gptq/`.
"""

from __future__ import annotations

import numpy as np

from nf4_pipeline.compiled import compiled
from nf4_pipeline.nf4.codebook import NF4_MIDPOINTS, SCALE_MIDPOINTS

# Named one by one, since LLVM keeps scalars in registers but reloads an array's items.
_M0, _M1, _M2, _M3, _M4, _M5, _M6, _M7 = NF4_MIDPOINTS[:8]
_M8, _M9, _M10, _M11, _M12, _M13, _M14 = NF4_MIDPOINTS[8:]


@compiled(inline="always")
def nearest_code(x):  # type: ignore[no-untyped-def]
    """The code, 0 to 15, of the NF4 level that is nearest to x."""
    b3 = x > _M7
    b2 = x > (_M11 if b3 else _M3)
    b1 = x > ((_M13 if b2 else _M9) if b3 else (_M5 if b2 else _M1))
    upper = (_M14 if b1 else _M12) if b2 else (_M10 if b1 else _M8)
    lower = (_M6 if b1 else _M4) if b2 else (_M2 if b1 else _M0)
    b0 = x > (upper if b3 else lower)
    return np.int32(b3) << 3 | np.int32(b2) << 2 | np.int32(b1) << 1 | np.int32(b0)


@compiled(inline="always")
def nearest_scale_code(x, low, high):  # type: ignore[no-untyped-def]
    """The code of the nearest scale level, where `low` to `high` midpoints are below x."""
    while low < high:
        middle = (low + high) // 2
        if SCALE_MIDPOINTS[middle] < x:
            low = middle + 1
        else:
            high = middle
    return low
