"""What calibration does, in figures. The defaults are the recipe; other values are for studies."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


def _shares() -> NDArray[np.float32]:
    return np.linspace(0.70, 1.15, 24).astype(np.float32)


@dataclass(frozen=True)
class Method:
    """How codes and scales are chosen.

    Attributes:
        shrink: share that is taken off the moment's elements beside the diagonal, at most, since a
            finite sample exaggerates them; 1 leaves plain rounding with weighted errors.
        by_sample: the share is columns / tokens, if that is less.
        damping: share of the mean of the diagonal that is added to it.
        by_importance: columns whose inputs are largest are rounded first; else as they stand.
        signs: 2 if scales may be negative, else 1.
        in_loop: scales are chosen again when their block is rounded.
        shares: scales that are tried, as shares of the largest weight of a block.
    """

    shrink: float = 0.1
    by_sample: bool = True
    damping: float = 0.01
    by_importance: bool = True
    signs: int = 2
    in_loop: bool = True
    shares: NDArray[np.float32] = field(default_factory=_shares)
