"""Several runs of a model that pass each block together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet

Opened = Callable[[str], None]
"""Told of a block before the first run enters it, or after the last has left it."""


@dataclass
class _Run:
    """One run: its stack, its random numbers, and the block before which it is held."""

    task: greenlet
    rng_state: list[torch.Tensor]
    barrier: str = ""


class Lockstep:
    """Holds runs at a barrier before each block until all have come there.

    Each run is an ordinary function that calls a model once (a forward) or often (generation), on a
    stack of its own (a greenlet). All of them share one thread, so what happens is the same every
    time. Each has random numbers of its own: a seed that it sets is not disturbed by the others.

    Args:
        models: the blocks of each model that takes part, by name; blocks of one name open together.
        opened: called before the first run enters a block.
        closed: called after the last one has left it.
        entered: called by each run as it enters a block; None for nothing.
    """

    def __init__(
        self,
        models: Sequence[Mapping[str, torch.nn.Module]],
        opened: Opened,
        closed: Opened,
        entered: Opened | None = None,
    ) -> None:
        self._models = models
        self._opened = opened
        self._closed = closed
        self._entered = entered or (lambda name: None)
        # Blocks that are closed say nothing of the device that they will be on.
        ready = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
        self._cuda = range(torch.cuda.device_count()) if ready else range(0)

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Runs all tasks to their ends; an error in one of them ends all.

        Args:
            tasks: functions without arguments or result.
        """
        waiting = getcurrent()  # the greenlet to which runs come back at a barrier
        with self._barriers(waiting), torch.inference_mode():
            runs = [_Run(greenlet(task), self._states()) for task in tasks]
            try:
                active = [run for run in runs if self._goes_on(run)]
                while active:
                    name = active[0].barrier
                    here = [run for run in active if run.barrier == name]
                    self._opened(name)
                    ended = [run for run in here if not self._goes_on(run)]
                    self._closed(name)
                    active = [run for run in active if run not in ended]
            finally:
                for run in runs:
                    if run.task and not run.task.dead:
                        run.task.throw()

    def _goes_on(self, run: _Run) -> bool:
        """Lets a run go to its next barrier; False if it ended instead."""
        common = self._states()
        self._set_states(run.rng_state)
        try:
            run.barrier = run.task.switch()
            run.rng_state = self._states()
        finally:
            self._set_states(common)
        return not run.task.dead

    def _states(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in self._cuda)]

    def _set_states(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for index, state in zip(self._cuda, states[1:], strict=True):
            torch.cuda.set_rng_state(state, index)

    @contextmanager
    def _barriers(self, waiting: greenlet) -> Iterator[None]:
        def barrier(name: str) -> Any:
            def stop(module: torch.nn.Module, inputs: Any) -> None:
                waiting.switch(name)
                self._entered(name)

            return stop

        with ExitStack() as stack:
            for blocks in self._models:
                for name, block in blocks.items():
                    stack.callback(block.register_forward_pre_hook(barrier(name)).remove)
            yield
