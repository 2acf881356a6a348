"""What comes to the layers of one block: in the 16-bit model, and behind what is quantized already.

The 16-bit model passes a block once, and its layers' inputs are kept. The model whose earlier
blocks are in 4 bit is held before the block; it runs again from there as far as the next layers
that have to be rounded, with all that was rounded before them in 4 bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from einops import rearrange

from nf4_pipeline.gptq.device_group import DeviceGroup

_ROWS: Final = 4096  # tokens of which products are summed at once, in float32
_DECOMPOSING: Final = 3.0
"""What a Cholesky factor takes beside an eighth of `drift`, by columns / tokens; on an H100, where
float64 is half as fast as float32. Only who does what hangs on it."""


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
        models: the layers by name, in each copy of the model that runs.
        batch: the number of the batch that runs now, or None if what runs is not to be watched.
    """

    def __init__(
        self,
        models: Sequence[Mapping[str, torch.nn.Module]],
        batch: Callable[[], int | None],
    ) -> None:
        self._batch = batch
        self._leader: dict[str, str] = {}
        self._given: dict[int, list[tuple[str, torch.Tensor]]] = {}  # by the number of the batch
        self._running: int | None = None
        self._latest: list[tuple[str, torch.Tensor]] = []  # of the batch that runs, as given
        self._hooks = ExitStack()
        for name, layer in (pair for layers in models for pair in layers.items()):
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
class LayerInputs:
    """What came to a layer behind the quantized part, call by call, batch after batch.

    Attributes:
        calls: y, [tokens, columns], and x, the same tokens in the 16-bit model; None if it is not
            known which they are. Each pair is on the device of its batch.
    """

    calls: list[tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(y) for y, _ in self.calls)

    @property
    def is_paired(self) -> bool:
        return all(x is not None for _, x in self.calls)

    def to(self, device: torch.device) -> LayerInputs:
        """The same, all on one device."""
        return LayerInputs(
            [(y.to(device), None if x is None else x.to(device)) for y, x in self.calls]
        )

    def parts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """y and x, some tokens at a time."""
        for y, x in self.calls:
            for first in range(0, len(y), _ROWS):
                chosen = slice(first, first + _ROWS)
                yield y[chosen], None if x is None else x[chosen]


class InputMoments:
    """Means over the tokens that came to a layer, which devices compute together.

    Rows of a sum are dealt to them, so each is summed in float32 from the first token to the last,
    wherever that is done.

    Args:
        inputs: what came, at least one token.
        group: the devices.
    """

    def __init__(self, inputs: LayerInputs, group: DeviceGroup) -> None:
        self._group = group
        self._tokens = inputs.tokens
        self._columns = inputs.calls[0][0].shape[1]
        self._is_paired = inputs.is_paired
        self._pieces = group.division.pieces(self._columns)
        # Before any of them begins: what is copied waits for all that its device was given to do.
        self._there = [inputs.to(device) for device in group.devices]
        self._busy = _DECOMPOSING * self._columns / self._tokens
        self._drifts: dict[int, torch.Tensor] = {}

    def hessian(self) -> torch.Tensor:
        """The mean of y y^T, [columns, columns], on the lead."""
        pieces, dealt = self._pieces, self._group.dealt(len(self._pieces))

        def share(index: int) -> dict[int, torch.Tensor]:
            sums: dict[int, torch.Tensor] = {}
            for y, _ in self._there[index].parts() if dealt[index] else ():
                part = y.float()
                for number in dealt[index]:
                    piece = pieces[number]
                    # What is to the right of it stands in the rows of a later piece.
                    _add(sums, number, part[:, piece], part[:, : piece.stop])
            return sums

        found = {number: rows for own in self._group.each(share) for number, rows in own.items()}
        if len(pieces) == 1:
            return found[0].div_(self._tokens)
        whole = self._square()
        for number, piece in enumerate(pieces):
            rows = found.pop(number).to(self._group.lead)
            whole[piece, : piece.stop] = rows
            whole[: piece.stop, piece] = rows.T
        return whole.div_(self._tokens)

    def add_drift(self, index: int) -> None:
        """Computes what is a device's own of `drift`, while the lead decomposes the Hessian."""
        own = self._group.dealt_beside(len(self._pieces), self._busy)[index]
        sums: dict[int, torch.Tensor] = {}
        for y, x in self._there[index].parts() if own and self._is_paired else ():
            part = y.float()
            assert x is not None  # of those that are paired
            apart = x.float() - part
            for number in own:
                _add(sums, number, apart[:, self._pieces[number]], part)
        self._there[index] = LayerInputs()
        self._drifts |= sums

    def drift(self) -> torch.Tensor | None:
        """The mean of (x - y) y^T on the lead, with x the input in the 16-bit model.

        Returns:
            None if the two cannot be paired, as behind a router.
        """
        if not self._is_paired:
            return None
        if len(self._pieces) == 1:
            return self._drifts.pop(0).to(self._group.lead).div_(self._tokens)
        whole = self._square()
        for number, piece in enumerate(self._pieces):
            whole[piece] = self._drifts.pop(number).to(self._group.lead)
        return whole.div_(self._tokens)

    def _square(self) -> torch.Tensor:
        shape = self._columns, self._columns
        return torch.empty(shape, dtype=torch.float32, device=self._group.lead)


def inputs_behind(
    block: Any,
    calls: Mapping[int, BlockCall],
    layers: Mapping[str, torch.nn.Module],
    exact: ExactInputs,
) -> dict[int, dict[str, LayerInputs]]:
    """Runs a block again, as its weights are now, as far as some of its layers.

    Args:
        block: the module.
        calls: what batches give to it, from the part that is quantized, by their numbers.
        layers: the leaders that are watched, by name.
        exact: what came to them in the 16-bit model.

    Returns:
        For each batch what came to each layer.
    """
    found: dict[int, dict[str, LayerInputs]] = {}
    for number, call in calls.items():
        found[number] = {name: LayerInputs() for name in layers}
        run = _Run(call, {name: exact.of(name, number) for name in layers}, found[number])
        with ExitStack() as hooks:
            for name, layer in layers.items():
                _watch(layer, hooks, partial(run.add, name))
            try:
                # Not block(...): its hooks hold runs, and this is none of them.
                block.forward(*map(_copy, call.args), **call.kwargs)
            except _FarEnough:
                pass
    return found


class _Run:
    """One batch on its way through a block, as far as the last layer that is watched."""

    def __init__(
        self,
        call: BlockCall,
        exact: dict[str, list[torch.Tensor]],
        found: Mapping[str, LayerInputs],
    ) -> None:
        self._call = call
        self._exact = exact
        self._found = found
        self._calls: dict[str, int] = dict.fromkeys(exact, 0)

    def add(self, name: str, x: torch.Tensor) -> None:
        """Keeps what came to a layer; ends the run when all layers have been called."""
        # A copy: what follows may change it in place.
        y, pairs, at = _rows(x).clone(), self._exact[name], self._calls[name]
        self._calls[name] += 1
        # A router may send other tokens here, and as many: only a whole batch is paired.
        fits = at < len(pairs) and pairs[at].shape == y.shape and len(y) == self._call.tokens
        self._found[name].calls.append((y, pairs[at] if fits else None))
        if all(self._calls[other] >= max(1, len(self._exact[other])) for other in self._calls):
            raise _FarEnough


def inputs_of(exact: ExactInputs, leader: str, batches: int) -> LayerInputs:
    """The 16-bit model's own inputs of a layer."""
    return LayerInputs([(x, None) for number in range(batches) for x in exact.of(leader, number)])


class _FarEnough(Exception):
    """Ends a run behind the last layer that is watched."""


def _add(
    sums: dict[int, torch.Tensor], number: int, left: torch.Tensor, right: torch.Tensor
) -> None:
    """Adds the product to the sum of that number."""
    if number in sums:
        sums[number].addmm_(left.T, right)
    else:
        sums[number] = left.T @ right


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
