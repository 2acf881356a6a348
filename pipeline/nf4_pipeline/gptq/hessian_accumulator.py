"""The second moment of each layer's inputs, gathered as the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Final

import torch

_ROWS: Final = 4096  # tokens of which products are summed at once, in float32


class Moments:
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
        found: dict[str, list[str]] = {}
        for name in self._counts:
            found.setdefault(self._leader.get(name, name), []).append(name)
        return found

    def take(self, leader: str) -> torch.Tensor | None:
        """The mean of x x^T, float32 [columns, columns]; None if no token came. It is let go."""
        total = self._sums.pop(leader, None)
        return None if total is None else total.div_(max(1, self._counts[leader]))

    def _hook(self, name: str) -> Any:
        def watch(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = inputs[0] if inputs else next(iter(named.values()))
            leader = next((other for other, seen in self._seen if seen is x), name)
            # The first tokens that come decide who shares; a router may send others elsewhere.
            if self._leader.setdefault(name, leader) != name:
                return
            self._seen.append((name, x))
            self._add(name, x.detach().reshape(-1, x.shape[-1]))

        return watch

    def _add(self, name: str, x: torch.Tensor) -> None:
        for first in range(0, len(x), _ROWS):
            values = x[first : first + _ROWS].float()
            if name not in self._sums:
                self._sums[name] = values.T @ values
            else:
                self._sums[name].addmm_(values.T, values)
        self._counts[name] += len(x)
