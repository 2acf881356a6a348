"""The pass through the model: every block is watched, and its weights are rounded behind it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, Final

import torch

from nf4_pipeline.blocks.lockstep import Lockstep
from nf4_pipeline.blocks.streamed import StreamedModel
from nf4_pipeline.calibration.block_store import Store
from nf4_pipeline.calibration.tokens import CalibrationTokens
from nf4_pipeline.errors import RecipeError
from nf4_pipeline.gptq.config import Method
from nf4_pipeline.gptq.hessian import Guide, IllConditionedError, guide
from nf4_pipeline.gptq.hessian_accumulator import Moments
from nf4_pipeline.gptq.quantizer import Choice, Chooser, ChooserOnCpu
from nf4_pipeline.model.linear import weight_out_in
from nf4_pipeline.progress import Reporter
from nf4_pipeline.selection import TensorPlan

OUTSIDE: Final = "outside"
"""The unit of layers that no block holds."""
_TOGETHER: Final = {"cpu": 2048, "cuda": 4096}  # tokens that run at once
_FEWEST: Final = 64
"""Tokens below which a layer's inputs say too little: it is rounded to nearest."""


def calibrate(
    folder: Path,
    weights: Sequence[TensorPlan],
    tokens: CalibrationTokens,
    store: Store,
    *,
    device: str,
    reporter: Reporter,
    method: Method | None = None,
) -> dict[str, float]:
    """Chooses codes and scales for all weights; what the store has already is left as it is.

    Args:
        folder: the 16-bit checkpoint.
        weights: what is quantized.
        tokens: what the model reads.
        store: receives the choices.
        device: "cpu" or "cuda:N".
        reporter: told how far it is.
        method: how; the default is the recipe's.

    Returns:
        Where the time went, in seconds: "whole", and, beside each other, what the parts took.

    Raises:
        RecipeError: a token is none of the model's.
    """
    with StreamedModel(folder, device) as streamed, steady(device):
        known, largest = streamed.model.get_input_embeddings().num_embeddings, tokens.ids.max()
        if largest >= known:
            raise RecipeError(
                f"Calibration token {largest} is beyond the model's {known:,}: the tokens, or the "
                "tokenizer that made them, are another model's."
            )
        units = _units(weights, list(streamed.blocks))
        missing = {
            unit for unit, plans in units.items() if not store.done(unit, [p.name for p in plans])
        }
        if not missing:
            return {}
        with reporter.task("calibrate", len(streamed.blocks), unit="blocks") as task:
            run = _Pass(streamed, units, missing, store, device, method or Method())
            with run.timed("whole"):
                run.over(tokens, lambda: task.advance(1))
        return {name: round(seconds, 2) for name, seconds in run.seconds.items()}


class _Pass:
    """One walk of all tokens through all blocks."""

    def __init__(
        self,
        streamed: StreamedModel,
        units: Mapping[str, Sequence[TensorPlan]],
        missing: set[str],
        store: Store,
        device: str,
        method: Method,
    ) -> None:
        self._streamed = streamed
        self._units = units
        self._missing = missing
        self._store = store
        self._device = device
        self._method = method
        self._moments: dict[str, Moments] = {}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time of the body to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[part] = self.seconds.get(part, 0.0) + spent

    def over(self, tokens: CalibrationTokens, passed: Callable[[], None]) -> None:
        """Walks, and rounds each block while the next one is watched."""
        with (
            ThreadPoolExecutor(len(os.sched_getaffinity(0)), "round") as pool,
            ThreadPoolExecutor(1, "choose") as behind,
        ):
            self._chooser = chooser_for(self._device, self._method, pool)
            self._behind = behind
            self._running: Future[None] | None = None
            try:
                if OUTSIDE in self._missing:
                    self._watch(OUTSIDE, self._body())
                lockstep = Lockstep(
                    [self._streamed.blocks], self._opened, lambda name: self._closed(name, passed)
                )
                lockstep.run(self._tasks(tokens))
                if OUTSIDE in self._missing:
                    self._finish(OUTSIDE)
                self._wait()
            finally:
                for moments in self._moments.values():
                    moments.close()

    def _tasks(self, tokens: CalibrationTokens) -> list[Callable[[], None]]:
        together = _TOGETHER[torch.device(self._device).type]
        batch = max(1, together // tokens.ids.shape[1])
        run = self._body()

        def task(first: int) -> Callable[[], None]:
            ids = torch.from_numpy(tokens.ids[first : first + batch]).long().to(self._device)

            def forward() -> None:
                run(ids, use_cache=False)

            return forward

        return [task(first) for first in range(0, len(tokens.ids), batch)]

    def _body(self) -> Any:
        """What is run: the model without its head, unless a layer of the head is calibrated."""
        model, prefix = self._streamed.model, self._streamed.model.base_model_prefix
        outside = self._units.get(OUTSIDE, ())
        if all(str(plan.module).startswith(f"{prefix}.") for plan in outside):
            return getattr(model, prefix, model)
        return model

    def _opened(self, block: str) -> None:
        self._streamed.open_ahead(block)
        if block in self._missing:
            self._watch(block, self._streamed.blocks[block])

    def _closed(self, block: str, passed: Callable[[], None]) -> None:
        if block in self._missing:
            self._finish(block)
        self._streamed.close(block)
        passed()

    def _watch(self, unit: str, scope: Any) -> None:
        layers = {plan.name: self._module(plan) for plan in self._units[unit]}
        self._moments[unit] = Moments(layers, scope)

    def _module(self, plan: TensorPlan) -> Any:
        assert plan.module is not None  # of every weight that is quantized
        return self._streamed.model.get_submodule(plan.module)

    def _finish(self, unit: str) -> None:
        """Has the weights of a unit rounded while others go on; one unit waits at most."""
        moments = self._moments.pop(unit)
        moments.close()
        weights = {}
        for plan in self._units[unit]:
            weight = weight_out_in(self._module(plan))
            # On the CPU the block's memory is read into again; on a device the weight stays alive.
            weights[plan.name] = weight.detach().clone() if weight.is_cpu else weight.detach()
        self._wait()
        self._running = self._behind.submit(self._round, unit, moments, weights)

    def _wait(self) -> None:
        if self._running is not None:
            with self.timed("waiting for choices"):
                self._running.result()

    def _round(self, unit: str, moments: Moments, weights: dict[str, torch.Tensor]) -> None:
        choices: dict[str, Choice] = {}
        fallbacks: dict[str, str] = {}
        with torch.inference_mode():
            for leader, names in moments.groups().items():
                try:
                    with self.timed("guides"):
                        prepared = self._guide(moments, leader)
                except IllConditionedError as error:
                    fallbacks |= dict.fromkeys(names, str(error))
                    continue
                with self.timed("choices"):
                    for name in names:
                        choice = self._chooser.choose(weights.pop(name), prepared)
                        if isfinite(choice.cost):
                            choices[name] = choice
                        else:
                            fallbacks[name] = "what rounding it costs is beyond float32"
                del prepared  # before the next one takes its place
        facts = {
            "weights": sorted(choices),
            "costs": {name: choice.cost for name, choice in sorted(choices.items())},
            "fallbacks": fallbacks,
        }
        with self.timed("writing"):
            self._store.write(unit, choices, facts)

    def _guide(self, moments: Moments, leader: str) -> Guide:
        moment = moments.take(leader)
        if moment is None or moments.tokens(leader) < _FEWEST:
            raise IllConditionedError(f"only {moments.tokens(leader)} tokens came to it")
        return guide(moment, moments.tokens(leader), self._method)


def chooser_for(device: str, method: Method, pool: ThreadPoolExecutor) -> Chooser:
    """What rounds on a device."""
    if torch.device(device).type == "cpu":
        return ChooserOnCpu(method, pool)
    from nf4_pipeline.gptq.quantizer_cuda import ChooserOnCuda

    return ChooserOnCuda(method, device, pool)


def _units(weights: Sequence[TensorPlan], blocks: Sequence[str]) -> dict[str, list[TensorPlan]]:
    """The weights of each block, and of none."""
    found: dict[str, list[TensorPlan]] = {}
    for plan in weights:
        block = next(
            (b for b in blocks if plan.module and plan.module.startswith(f"{b}.")), OUTSIDE
        )
        found.setdefault(block, []).append(plan)
    return found


@contextmanager
def steady(device: str) -> Iterator[None]:
    """One thread for each operation of torch on the CPU: how sums are cut must not depend on it."""
    before = torch.get_num_threads()
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
