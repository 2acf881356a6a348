"""The Hessian of a layer's output error, factorized, and what its inputs' own error asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from einops import rearrange

from nf4_pipeline.gptq.config import GptqConfig
from nf4_pipeline.nf4 import BLOCK_SIZE

_LEAST: Final = 1e-24
"""The mean square of inputs that are as good as zero: losses of them vanish in float32."""


class IllConditionedError(Exception):
    """A Hessian gives no factor; the layer is rounded to nearest instead."""


@dataclass(frozen=True)
class HessianFactor:
    """How the columns of a weight are rounded.

    Attributes:
        order: the column at each place, int64 [columns]. Blocks of 64 stay together if the columns
            are whole blocks.
        factor: U, upper triangular, in that order, with inverse(H) = U^T U; float32
            [columns, columns].
        diagonal: of H, columns as they stand; float32 [columns].
    """

    order: torch.Tensor
    factor: torch.Tensor
    diagonal: torch.Tensor

    def cpu(self) -> HessianFactor:
        """The same on the CPU."""
        return HessianFactor(self.order.cpu(), self.factor.cpu(), self.diagonal.cpu())


def factorize(hessian: torch.Tensor, tokens: int, config: GptqConfig) -> HessianFactor:
    """Prepares the rounding of weights whose inputs have a Hessian.

    Args:
        hessian: the mean of x x^T over the tokens, [columns, columns], on any device.
        tokens: how many they were.
        config: shrinkage, damping, order.

    Raises:
        IllConditionedError: the Hessian is not finite, zero, or has no Cholesky factor.
    """
    h = hessian.to(torch.float64, copy=True)
    undamped = h.diagonal().clone()
    mean = float(undamped.mean())
    if not torch.isfinite(h).all():
        raise IllConditionedError("its inputs are not finite")
    if mean < _LEAST:
        raise IllConditionedError("its inputs are all zero")
    shrinkage = config.shrinkage
    if config.adaptive_shrinkage:
        shrinkage = min(shrinkage, len(h) / tokens)
    h *= 1.0 - shrinkage
    h.diagonal().copy_(undamped + config.percdamp * mean)
    diagonal = h.diagonal().float()
    order = _act_order(diagonal) if config.act_order else torch.arange(len(h), device=h.device)
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
    return HessianFactor(order, factor.contiguous(), diagonal)


def corrected(
    weight: torch.Tensor, drift: torch.Tensor, factor: HessianFactor, share: float
) -> torch.Tensor:
    """The weight that, from inputs that have an error already, gives what the exact ones give.

    With x the exact inputs and y those behind what is quantized, |W x - V y|^2 summed over the
    tokens is least for V = W + W D inverse(H), where D = mean (x - y) y^T and H = mean y y^T
    (GPTAQ, arXiv:2504.02692; Qronos, arXiv:2505.11695). A share of it is taken, since D is an
    estimate from few tokens.

    Args:
        weight: W, [rows, columns] of any float dtype.
        drift: D, float32 [columns, columns].
        factor: of H, with its shrinkage and damping.
        share: of the correction, 0 to 1.

    Returns:
        float32 [rows, columns]; W itself if the correction is not finite.
    """
    exact = weight.float()
    wanted = (exact @ drift)[:, factor.order] @ factor.factor.T @ factor.factor
    correction = torch.empty_like(wanted)
    correction[:, factor.order] = wanted
    moved = exact + share * correction
    return moved if bool(torch.isfinite(moved).all()) else exact


def _act_order(diagonal: torch.Tensor) -> torch.Tensor:
    """Blocks by the sum of their columns' diagonal, columns within them by their own."""
    if len(diagonal) % BLOCK_SIZE:
        return diagonal.argsort(descending=True, stable=True)
    blocks = rearrange(diagonal, "(block column) -> block column", column=BLOCK_SIZE)
    within = blocks.argsort(dim=1, descending=True, stable=True)
    first = blocks.double().sum(1).argsort(descending=True, stable=True)
    order: torch.Tensor = rearrange(
        within[first] + BLOCK_SIZE * first[:, None], "block column -> (block column)"
    )
    return order
