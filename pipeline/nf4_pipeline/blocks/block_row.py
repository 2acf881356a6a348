"""A model's forward in pieces: as far as its blocks, through one of them, and from the last one on.

So one block at a time needs weights, forward and backward, whatever the model does in front of its
blocks and behind them. That its blocks follow each other, and nothing else, is checked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

_HIDDEN: Final = "hidden_states"


class NotInARowError(Exception):
    """The blocks of a model do not simply follow each other; says why."""


@dataclass(frozen=True)
class RowCall:
    """How the model calls one of its blocks, apart from the hidden states.

    Attributes:
        args: of the block's forward; the first is left out if it is the hidden states.
        kwargs: likewise.
        is_first: whether hidden states are the first of `args`, not one of `kwargs`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_first: bool


class BlockRow:
    """The blocks of a model, each of which can be run by itself. Safe for threads.

    Args:
        model: a causal LM; the forward of its blocks is replaced.
        blocks: by name, in order.
    """

    def __init__(self, model: Any, blocks: Mapping[str, torch.nn.Module]) -> None:
        self._model = model
        self._names = list(blocks)
        self._forwards = {name: block.forward for name, block in blocks.items()}
        self._wraps: dict[str, Callable[[torch.Tensor], Any]] = {}
        self._thread = threading.local()
        for name, block in blocks.items():
            block.forward = partial(self._called, name)

    def check(
        self, ids: torch.Tensor, opened: Callable[[str], None], closed: Callable[[str], None]
    ) -> None:
        """Runs the model as it is, and then in pieces; this, or `trust`, comes before all else.

        Args:
            ids: some sequences. They run forward and backward, so that two different runs pass
                each block in turn.
            opened: gives a block its weights.
            closed: takes them away again.

        Raises:
            NotInARowError: the pieces do not give what the model gives, or it does not pass its
                blocks one after the other.
        """
        handed: list[torch.Tensor] = []
        passed: list[str] = []

        def run(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given, _ = _without_hidden(args, kwargs)
            if handed and given is not handed[-1]:
                raise NotInARowError(f"{name} is not given what the block in front of it gives")
            passed.append(name)
            opened(name)
            output = self._forwards[name](*args, **kwargs)
            closed(name)
            handed.append(_hidden(name, output))
            self._wraps[name] = _wrap_as(output)
            return output

        both = ids, ids.flip(-1)
        expected: list[torch.Tensor] = []
        with torch.no_grad(), self._blocks_are(run):
            for each in both:
                handed.clear()
                expected.append(self._model(each, use_cache=False).logits)
        if passed != 2 * self._names:
            raise NotInARowError("the model does not pass each of its blocks once, in order")
        with torch.no_grad():
            hidden, calls = (list(found) for found in zip(*map(self.arrive, both), strict=True))
            for name in self._names:
                opened(name)
                hidden = [self.through(name, calls[i][name], hidden[i]) for i in range(2)]
                closed(name)
            found = [self.logits(each, last) for each, last in zip(both, hidden, strict=True)]
        if not all(map(_equal, found, expected)):
            raise NotInARowError("its blocks need more of each other than hidden states")

    def trust(self, other: BlockRow) -> None:
        """Takes over what `check` found out of another model with the same blocks."""
        self._wraps = dict(other._wraps)

    def arrive(self, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, RowCall]]:
        """What is given to the first block, and how each of them is called."""
        first: list[torch.Tensor] = []
        calls: dict[str, RowCall] = {}

        def pass_over(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, calls[name] = _without_hidden(args, kwargs)
            first.append(hidden)
            if name == self._names[-1]:
                raise _Arrived
            return self._wraps[name](hidden)

        with self._blocks_are(pass_over):
            try:
                self._model(ids, use_cache=False)
            except _Arrived:
                pass
        return first[0], calls

    def through(self, name: str, call: RowCall, hidden: torch.Tensor) -> torch.Tensor:
        """What a block gives; it must have its weights."""
        args, kwargs = call.args, call.kwargs
        if call.is_first:
            args = (hidden, *args)
        else:
            kwargs = kwargs | {_HIDDEN: hidden}
        return _hidden(name, self._forwards[name](*args, **kwargs))

    def logits(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What the model predicts if its last block gives these hidden states."""

        def pass_over(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given, _ = _without_hidden(args, kwargs)
            return self._wraps[name](hidden if name == self._names[-1] else given)

        with self._blocks_are(pass_over):
            logits: torch.Tensor = self._model(ids, use_cache=False).logits
        return logits

    def _called(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The forward of a block: its own, unless this thread runs the model for its pieces."""
        instead = getattr(self._thread, "instead", None)
        if instead is None:
            return self._forwards[name](*args, **kwargs)
        return instead(name, args, kwargs)

    @contextmanager
    def _blocks_are(self, instead: Callable[..., Any]) -> Iterator[None]:
        self._thread.instead = instead
        try:
            yield
        finally:
            self._thread.instead = None


class _Arrived(Exception):
    """Ends a forward at the last block."""


def _without_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, RowCall]:
    """The hidden states that a block is given, and all else."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0], RowCall(args[1:], kwargs, is_first=True)
    if isinstance(kwargs.get(_HIDDEN), torch.Tensor):
        others = {name: value for name, value in kwargs.items() if name != _HIDDEN}
        return kwargs[_HIDDEN], RowCall(args, others, is_first=False)
    raise NotInARowError("a block is given no hidden states that could be told from the rest")


def _hidden(name: str, output: Any) -> torch.Tensor:
    """The hidden states that a block gives."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, torch.Tensor):
        raise NotInARowError(f"{name} gives a {type(output).__name__}, not hidden states")
    return first


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def _wrap_as(output: Any) -> Callable[[torch.Tensor], Any]:
    """Makes of hidden states what a block gives."""
    if isinstance(output, torch.Tensor):
        return lambda hidden: hidden
    kind, others = type(output), len(output) - 1
    return lambda hidden: kind([hidden, *[None] * others])
