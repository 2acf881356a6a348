"""The Hessian of each layer's output error: summed up as the model runs, then factorized."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import torch
from einops import rearrange

from nf4_pipeline.gptq.config import GptqConfig
from nf4_pipeline.nf4 import BLOCK_SIZE

_ROWS: Final = 4096  # tokens of which products are summed at once, in float32
_LEAST: Final = 1e-24
"""The mean square of inputs that are as good as zero: losses of them vanish in float32."""


class HessianAccumulator:
    """Watches layers, and sums x x^T over all tokens that come to each of them.

    Layers that are given the same tensor share one sum. Every sum is in float32, tokens in the
    order in which they come.

    Args:
        layers: by name.
        scope: the module that they are in; what is kept to recognize shared inputs is let go when
            a run has passed it.
    """

    def __init__(self, layers: Mapping[str, torch.nn.Module], scope: torch.nn.Module) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = dict.fromkeys(layers, 0)
        self._leader: dict[str, str] = {}
        self._seen: list[tuple[str, torch.Tensor]] = []
        self._hooks = ExitStack()
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            self._hooks.callback(hook.remove)
        passed = scope.register_forward_hook(lambda *_: self._seen.clear())
        self._hooks.callback(passed.remove)

    def close(self) -> None:
        """Stops watching."""
        self._seen.clear()
        self._hooks.close()

    def tokens(self, name: str) -> int:
        """How many came to a layer."""
        return self._counts[self._leader.get(name, name)]

    def groups(self) -> dict[str, list[str]]:
        """Layers that share their inputs: the name of the first -> the names of all."""
        groups: dict[str, list[str]] = {}
        for name in self._counts:
            groups.setdefault(self._leader.get(name, name), []).append(name)
        return groups

    def take(self, leader: str) -> torch.Tensor | None:
        """The mean of x x^T, float32 [columns, columns]; None if no token came. It is let go."""
        total = self._sums.pop(leader, None)
        return None if total is None else total.div_(max(1, self._counts[leader]))

    def _hook(self, name: str) -> Any:
        def watch(
            module: Any, inputs: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]
        ) -> None:
            x = inputs[0] if inputs else next(iter(named.values()))
            leader = next((other for other, seen in self._seen if seen is x), name)
            # The first tokens that come decide who shares; a router may send others elsewhere.
            if self._leader.setdefault(name, leader) != name:
                return
            self._seen.append((name, x))
            self._accumulate(name, rearrange(x.detach(), "... columns -> (...) columns"))

        return watch

    def _accumulate(self, name: str, x: torch.Tensor) -> None:
        """Adds x^T x of [tokens, columns]."""
        for first in range(0, len(x), _ROWS):
            values = x[first : first + _ROWS].float()
            if name not in self._sums:
                self._sums[name] = values.T @ values
            else:
                self._sums[name].addmm_(values.T, values)
        self._counts[name] += len(x)


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
