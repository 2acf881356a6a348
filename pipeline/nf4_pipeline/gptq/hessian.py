"""A second moment -> the order of the columns, and what each one passes on to those behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from nf4_pipeline.gptq.config import Method
from nf4_pipeline.nf4 import BLOCK_SIZE

_LEAST: Final = 1e-24
"""The mean square of inputs that are as good as zero: losses of them vanish in float32."""


class IllConditionedError(Exception):
    """No guide comes of a moment; the layer is rounded to nearest instead."""


@dataclass(frozen=True)
class Guide:
    """How the columns of a weight are rounded.

    Attributes:
        order: the column at each place, int64 [columns]. Blocks of 64 stay together if the columns
            are whole blocks.
        factor: U, upper triangular, in that order, with inverse(H) = U^T U; float32
            [columns, columns].
        importance: the diagonal of H, columns as they stand; float32 [columns].
    """

    order: torch.Tensor
    factor: torch.Tensor
    importance: torch.Tensor


def guide(moment: torch.Tensor, tokens: int, method: Method) -> Guide:
    """Prepares the rounding of weights whose inputs have a second moment.

    Args:
        moment: the mean of x x^T over the tokens, [columns, columns], on any device.
        tokens: how many they were.
        method: shrinking, damping, order.

    Raises:
        IllConditionedError: the moment is not finite, zero, or has no Cholesky factor.
    """
    h = moment.to(torch.float64, copy=True)
    diagonal = h.diagonal().clone()
    mean = float(diagonal.mean())
    if not torch.isfinite(h).all():
        raise IllConditionedError("its inputs are not finite")
    if mean < _LEAST:
        raise IllConditionedError("its inputs are all zero")
    shrink = min(method.shrink, len(h) / tokens) if method.by_sample else method.shrink
    h *= 1.0 - shrink
    h.diagonal().copy_(diagonal + method.damping * mean)
    importance = h.diagonal().float()
    order = _order(importance, method.by_importance)
    # With the columns backwards, the lower factor of H is the upper one, and only that one has to
    # be inverted: H = R R^T with R upper triangular, so inverse(H) = U^T U with U = inverse(R).
    backwards = order.flip(0)
    h = h[backwards[:, None], backwards]
    lower, failed = torch.linalg.cholesky_ex(h)
    if int(failed):
        raise IllConditionedError("the second moment of its inputs is not positive definite")
    del h
    unit = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    factor = torch.linalg.solve_triangular(lower, unit, upper=False)
    del lower, unit
    factor = factor.float().flip(0, 1)
    if not torch.isfinite(factor).all() or float(factor.diagonal().min()) <= 0.0:
        raise IllConditionedError("the second moment of its inputs is too ill-conditioned")
    return Guide(order, factor.contiguous(), importance)


def _order(importance: torch.Tensor, by_importance: bool) -> torch.Tensor:
    """Blocks by the sum of what their columns matter, columns within by what they matter."""
    columns = len(importance)
    if not by_importance:
        return torch.arange(columns, device=importance.device)
    if columns % BLOCK_SIZE:
        return importance.argsort(descending=True, stable=True)
    blocks = importance.reshape(-1, BLOCK_SIZE)
    within = blocks.argsort(dim=1, descending=True, stable=True)
    first = blocks.double().sum(1).argsort(descending=True, stable=True)
    return (within[first] + BLOCK_SIZE * first[:, None]).reshape(-1)
