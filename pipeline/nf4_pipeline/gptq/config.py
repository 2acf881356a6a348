"""What GPTQ does, in figures. The defaults are the recipe; other values are for studies."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


def _scale_candidates() -> NDArray[np.float32]:
    return np.linspace(0.70, 1.15, 24).astype(np.float32)


@dataclass(frozen=True)
class GptqConfig:
    """How codes and scales are chosen.

    Attributes:
        shrinkage: share that is taken off the Hessian's elements beside the diagonal, at most,
            since a finite sample exaggerates them; 1 leaves plain rounding with weighted errors.
        adaptive_shrinkage: the share is columns / tokens, if that is less.
        percdamp: share of the mean of the diagonal that is added to it.
        act_order: columns whose inputs are largest are rounded first; else as they stand.
        negative_scales: scales may be negative.
        refine_scales: scales are chosen again when their block is rounded.
        scale_candidates: scales that are tried, as shares of the largest weight of a block.
        quantized_inputs: the Hessian is that of the inputs behind what is quantized already; else
            of the 16-bit model's own.
        correction: share of the correction for those inputs that is taken (see
            `hessian.corrected`). Half generalizes best from 16,384 tokens.
    """

    shrinkage: float = 0.1
    adaptive_shrinkage: bool = True
    percdamp: float = 0.01
    act_order: bool = True
    negative_scales: bool = True
    refine_scales: bool = True
    scale_candidates: NDArray[np.float32] = field(default_factory=_scale_candidates)
    quantized_inputs: bool = True
    correction: float = 0.5

    @property
    def signs(self) -> int:
        """How many signs a scale may have, as the kernels take it: 1 or 2."""
        return 2 if self.negative_scales else 1
