"""The Hessian of a layer's output error, factorized, and what its inputs' own error asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from einops import rearrange

from nf4_pipeline.gptq.config import GptqConfig
from nf4_pipeline.gptq.device_group import DeviceGroup
from nf4_pipeline.nf4 import BLOCK_SIZE

_Decomposed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
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

    def to(self, device: torch.device) -> HessianFactor:
        """The same on a device."""
        return HessianFactor(
            self.order.to(device), self.factor.to(device), self.diagonal.to(device)
        )

    def cpu(self) -> HessianFactor:
        """The same on the CPU."""
        return self.to(torch.device("cpu"))


def factorize(
    hessian: torch.Tensor,
    tokens: int,
    config: GptqConfig,
    group: DeviceGroup | None = None,
    beside: Callable[[int], None] = lambda index: None,
) -> HessianFactor:
    """Prepares the rounding of weights whose inputs have a Hessian.

    Args:
        hessian: the mean of x x^T over the tokens, [columns, columns], on any device.
        tokens: how many they were.
        config: shrinkage, damping, order.
        group: of devices that share the work, led by that of the Hessian; None for this one alone.
        beside: called with the number of each device, since the Cholesky factor is computed by the
            lead alone, which calls it after that.

    Returns:
        The factor, on the Hessian's device.

    Raises:
        IllConditionedError: the Hessian is not finite, zero, or has no Cholesky factor.
    """
    group = group or DeviceGroup([hessian.device])

    def work(index: int) -> _Decomposed | None:
        found = _decompose(hessian, tokens, config) if index == 0 else None
        beside(index)
        return found

    decomposed = group.each(work)[0]
    assert decomposed is not None  # of the lead
    order, diagonal, lower = decomposed
    factor = _inverse_backwards(lower, group)
    if not torch.isfinite(factor).all() or float(factor.diagonal().min()) <= 0.0:
        raise IllConditionedError("the second moment of its inputs is too ill-conditioned")
    return HessianFactor(order, factor, diagonal)


def _decompose(hessian: torch.Tensor, tokens: int, config: GptqConfig) -> _Decomposed:
    """The order of the columns, the diagonal, and the Cholesky factor of them backwards."""
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
    return order, diagonal, lower


def _inverse_backwards(lower: torch.Tensor, group: DeviceGroup) -> torch.Tensor:
    """The inverse of a lower triangular matrix with its rows and columns backwards, in float32.

    Columns are solved for piece by piece: above a column's own row the inverse has zeros alone.
    """
    columns = len(lower)
    pieces = group.division.pieces(columns)

    def solved(piece: slice, own: torch.Tensor) -> torch.Tensor:
        below = columns - piece.start
        unit = torch.eye(below, piece.stop - piece.start, dtype=own.dtype, device=own.device)
        part: torch.Tensor = torch.linalg.solve_triangular(
            own[piece.start :, piece.start :], unit, upper=False
        )
        return part.float().flip(0, 1)

    if len(pieces) == 1:
        return solved(pieces[0], lower).contiguous()

    dealt = group.dealt(len(pieces))
    # Before any of them begins: what is copied waits for all that its device was given to do.
    there = [
        lower.to(device) if own else lower for device, own in zip(group.devices, dealt, strict=True)
    ]

    def share(index: int) -> dict[int, torch.Tensor]:
        return {number: solved(pieces[number], there[index]) for number in dealt[index]}

    shares = group.each(share)
    there.clear()
    inverse = torch.zeros(columns, columns, dtype=torch.float32, device=lower.device)
    for parts in shares:
        for number, part in parts.items():
            piece = pieces[number]
            inverse[: columns - piece.start, columns - piece.stop : columns - piece.start] = (
                part.to(lower.device)
            )
    return inverse


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
