"""In what the versions of transformers differ that this project works on."""

from __future__ import annotations

import inspect
from typing import Final

from transformers.models.mamba.modeling_mamba import MambaMixer

MULTIPLIES_BY_WEIGHT: Final = "dt_proj.weight @" in inspect.getsource(
    getattr(MambaMixer, "slow_forward", MambaMixer.forward)
)
"""Whether Mamba multiplies by a projection's weight itself, wherever it runs: in 5.5.0 it only does
so with kernels of its own."""
