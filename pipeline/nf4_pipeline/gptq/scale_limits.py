"""How large a scale may become, so that whoever looks at an artifact can hold it to a bound.

What earlier columns lost, and the correction, may move the weights of a block to many times what
they were, if their inputs hardly matter. A scale that follows them says nothing of the weights that
it stands for, and one that is simply wrong could not be told from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.nf4 import BLOCK_SIZE

if TYPE_CHECKING:
    import torch

REACH: Final = 2.0
"""A scale without its sign, as a share of the largest of its 64 weights, at most."""
SMALL: Final = 0.05
"""Blocks whose largest weight is less than this share of the mean block's count as so large."""


def scale_limits(weight: torch.Tensor) -> NDArray[np.float32]:
    """What no scale of a weight may be beyond.

    Args:
        weight: as the model has it, before anything is corrected, [rows, columns] of any float
            dtype, which must hold the scales, too; on any device.

    Returns:
        float32 [ceil(rows * columns / 64)].
    """
    import torch

    flat = weight.reshape(-1)
    if flat.numel() % BLOCK_SIZE:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK_SIZE))
    largest = flat.reshape(-1, BLOCK_SIZE).abs().amax(dim=1).double().cpu().numpy()
    reach = REACH * np.maximum(largest, SMALL * largest.mean())
    limits: NDArray[np.float32] = np.minimum(reach, torch.finfo(weight.dtype).max).astype(
        np.float32
    )
    return limits
