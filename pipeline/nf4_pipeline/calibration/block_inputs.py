"""What comes to the layers of one block: in the 16-bit model, and behind what is quantized already.

The 16-bit model passes a block once, and its layers' inputs are kept. The model whose earlier
blocks are in 4 bit is held before the block; it runs again from there as far as the next layers
that have to be rounded, with all that was rounded before them in 4 bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from einops import rearrange

_ROWS: Final = 4096  # tokens of which products are summed at once, in float32


@dataclass
class BlockCall:
    """What one batch of sequences gives to a block.

    Attributes:
        tokens: how many the batch has.
        args: of the block's forward.
        kwargs: likewise.
    """

    tokens: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class ExactInputs:
    """Keeps what comes to layers in the 16-bit model.

    Layers that are given the same tensor are a group; the one that is called first leads it. The
    first tokens that come decide who shares: a router may send others elsewhere.

    Args:
        layers: by name.
        batch: the number of the batch that runs now, or None if what runs is not to be watched.
    """

    def __init__(
        self, layers: Mapping[str, torch.nn.Module], batch: Callable[[], int | None]
    ) -> None:
        self._batch = batch
        self._leader: dict[str, str] = {}
        self._given: dict[int, list[tuple[str, torch.Tensor]]] = {}  # by the number of the batch
        self._running: int | None = None
        self._latest: list[tuple[str, torch.Tensor]] = []  # of the batch that runs, as given
        self._hooks = ExitStack()
        for name, layer in layers.items():
            _watch(layer, self._hooks, partial(self._keep, name))

    def close(self) -> None:
        """Stops watching."""
        self._latest = []
        self._hooks.close()

    def _keep(self, name: str, x: torch.Tensor) -> None:
        batch = self._batch()
        if batch is None:
            return
        if batch != self._running:
            self._running, self._latest = batch, []
        leader = next((other for other, seen in self._latest if seen is x), name)
        if self._leader.setdefault(name, leader) == name:
            self._latest.append((name, x))
            # A copy: what follows may change it in place.
            self._given.setdefault(batch, []).append((name, x.detach().clone()))

    def steps(self) -> list[dict[str, list[str]]]:
        """What is rounded together, in the order in which the block calls it.

        Returns:
            For each step, the name of each leader -> the names of its group. Experts are one step,
            layer by layer, since none of them is behind another. Layers that nothing came to are in
            none.
        """
        steps: dict[str, dict[str, list[str]]] = {}
        for name, leader in self._leader.items():  # in order of the first call
            steps.setdefault(_kind(leader), {}).setdefault(leader, []).append(name)
        return list(steps.values())

    def of(self, leader: str, batch: int) -> list[torch.Tensor]:
        """What came to a layer in a batch, call by call: [tokens, columns] each."""
        return [_rows(x) for name, x in self._given.get(batch, []) if name == leader]

    def let_go(self, leader: str) -> None:
        """Frees what was kept of a layer."""
        for batch, given in self._given.items():
            self._given[batch] = [(name, x) for name, x in given if name != leader]


@dataclass
class InputMoments:
    """Sums over the tokens that came to a layer, float32, tokens in the order in which they came.

    Attributes:
        hessian: the sum of y y^T, [columns, columns]; None if no token came.
        drift: the sum of (x - y) y^T with x the input in the 16-bit model; None if the two cannot
            be paired, as behind a router.
        tokens: how many they were.
    """

    hessian: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    tokens: int = 0
    _is_paired: bool = True

    def add(self, y: torch.Tensor, x: torch.Tensor | None) -> None:
        """Adds what came in one call.

        Args:
            y: [tokens, columns].
            x: the same tokens in the 16-bit model, [tokens, columns]; None if it is not known
                which they are.
        """
        if x is None:
            self._is_paired, self.drift = False, None
        for first in range(0, len(y), _ROWS):
            part = y[first : first + _ROWS].float()
            self.hessian = _added(self.hessian, part, part)
            if self._is_paired and x is not None:
                apart = x[first : first + _ROWS].float() - part
                self.drift = _added(self.drift, apart, part)
        self.tokens += len(y)

    def means(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`hessian` and `drift` by the number of tokens; the sums are used up."""
        found = self.hessian, self.drift
        self.hessian = self.drift = None
        hessian, drift = (None if s is None else s.div_(max(1, self.tokens)) for s in found)
        return hessian, drift


def moments_behind(
    block: Any,
    calls: Sequence[BlockCall],
    layers: Mapping[str, torch.nn.Module],
    exact: ExactInputs,
) -> dict[str, InputMoments]:
    """Runs a block again, as its weights are now, as far as some of its layers.

    Args:
        block: the module.
        calls: what the batches give to it, from the part that is quantized.
        layers: the leaders that are watched, by name.
        exact: what came to them in the 16-bit model.
    """
    sums = {name: InputMoments() for name in layers}
    for number, call in enumerate(calls):
        run = _Run(call, {name: exact.of(name, number) for name in layers}, sums)
        with ExitStack() as hooks:
            for name, layer in layers.items():
                _watch(layer, hooks, partial(run.add, name))
            try:
                # Not block(...): its hooks hold runs, and this is none of them.
                block.forward(*map(_copy, call.args), **call.kwargs)
            except _FarEnough:
                pass
    return sums


class _Run:
    """One batch on its way through a block, as far as the last layer that is watched."""

    def __init__(
        self,
        call: BlockCall,
        exact: dict[str, list[torch.Tensor]],
        sums: Mapping[str, InputMoments],
    ) -> None:
        self._call = call
        self._exact = exact
        self._sums = sums
        self._calls: dict[str, int] = dict.fromkeys(exact, 0)

    def add(self, name: str, x: torch.Tensor) -> None:
        """Adds what came to a layer; ends the run when all layers have been called."""
        y, pairs, at = _rows(x), self._exact[name], self._calls[name]
        self._calls[name] += 1
        # A router may send other tokens here, and as many: only a whole batch is paired.
        fits = at < len(pairs) and pairs[at].shape == y.shape and len(y) == self._call.tokens
        self._sums[name].add(y, pairs[at] if fits else None)
        if all(self._calls[other] >= max(1, len(self._exact[other])) for other in self._calls):
            raise _FarEnough


def moments_of(exact: ExactInputs, leader: str, batches: int) -> InputMoments:
    """The sums of the 16-bit model's own inputs."""
    sums = InputMoments()
    for batch in range(batches):
        for x in exact.of(leader, batch):
            sums.add(x, None)
    return sums


class _FarEnough(Exception):
    """Ends a run behind the last layer that is watched."""


def _added(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.T @ right if total is None else total.addmm_(left.T, right)


def _rows(x: torch.Tensor) -> torch.Tensor:
    rows: torch.Tensor = rearrange(x.detach(), "... columns -> (...) columns")
    return rows


def _kind(name: str) -> str:
    """A layer's name without the numbers of experts."""
    return re.sub(r"\.\d+\.", ".", name)


def _copy(value: Any) -> Any:
    """A block may change its input in place."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def _watch(layer: torch.nn.Module, hooks: ExitStack, told: Callable[[torch.Tensor], None]) -> None:
    """Has a function told of a layer's input, until the hooks are closed."""

    def hook(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        told(inputs[0] if inputs else next(iter(named.values())))

    hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
