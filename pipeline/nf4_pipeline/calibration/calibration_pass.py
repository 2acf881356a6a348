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
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.calibration.block_store import BlockStore
from nf4_pipeline.calibration.tokens import CalibrationTokens
from nf4_pipeline.errors import RecipeError
from nf4_pipeline.gptq.config import GptqConfig
from nf4_pipeline.gptq.hessian import (
    HessianAccumulator,
    HessianFactor,
    IllConditionedError,
    factorize,
)
from nf4_pipeline.gptq.quantizer import QuantizedWeight, quantizer_for
from nf4_pipeline.model.linear import weight_out_in
from nf4_pipeline.nf4.compiling import compilation_shown
from nf4_pipeline.progress import Reporter, Task
from nf4_pipeline.selection import TensorPlan

OUTSIDE: Final = "outside"
"""Stands for a block where layers are meant that no block holds."""
_TOGETHER: Final = {"cpu": 2048, "cuda": 4096}  # tokens that run at once
_FEWEST: Final = 64
"""Tokens below which a layer's inputs say too little: it is rounded to nearest."""


def calibrate(
    folder: Path,
    weights: Sequence[TensorPlan],
    tokens: CalibrationTokens,
    store: BlockStore,
    *,
    device: str,
    reporter: Reporter,
    config: GptqConfig | None = None,
) -> dict[str, float]:
    """Chooses codes and scales for all weights; what the store has already is left as it is.

    Args:
        folder: the 16-bit checkpoint.
        weights: what is quantized.
        tokens: what the model reads.
        store: receives them.
        device: "cpu" or "cuda:N".
        reporter: told how far it is.
        config: how; the default is the recipe's.

    Returns:
        Where the time went, in seconds: "whole", and, beside each other, what the parts took.

    Raises:
        RecipeError: a token is beyond the model's vocabulary.
    """
    with StreamedModel(folder, device) as streamed, deterministic_threads(device):
        known, largest = streamed.model.get_input_embeddings().num_embeddings, tokens.ids.max()
        if largest >= known:
            raise RecipeError(
                f"Calibration token {largest} is beyond the model's {known:,}: the tokens, or the "
                "tokenizer that made them, are another model's."
            )
        plans = _by_block(weights, list(streamed.blocks))
        missing = {
            block: own
            for block, own in plans.items()
            if not store.is_done(block, [plan.name for plan in own])
        }
        if not missing:
            return {}
        with (
            compilation_shown(reporter),
            reporter.task("calibrate", len(streamed.blocks), unit="blocks") as task,
        ):
            work = _Pass(streamed, missing, store, config or GptqConfig())
            with work.timed("whole"):
                work.over(tokens, task)
        return {name: round(seconds, 2) for name, seconds in work.seconds.items()}


class _Pass:
    """One walk of all tokens through all blocks.

    Args:
        streamed: the 16-bit model.
        plans: the weights to quantize by the name of their block.
        store: receives their codes and scales.
        config: how they are chosen.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        plans: Mapping[str, Sequence[TensorPlan]],
        store: BlockStore,
        config: GptqConfig,
    ) -> None:
        self._streamed = streamed
        self._plans = plans
        self._store = store
        self._config = config
        self._watched: dict[str, HessianAccumulator] = {}
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

    def over(self, tokens: CalibrationTokens, task: Task) -> None:
        """Walks, and rounds each block while the next one is watched."""
        with (
            ThreadPoolExecutor(len(os.sched_getaffinity(0)), "round") as pool,
            ThreadPoolExecutor(1, "quantize") as behind,
        ):
            self._quantizer = quantizer_for(str(self._streamed.device), self._config, pool)
            self._behind = behind
            self._running: Future[None] | None = None
            try:
                if OUTSIDE in self._plans:
                    self._watch(OUTSIDE, self._body())

                def closed(block: str) -> None:
                    self._closed(block)
                    task.advance(1)

                Lockstep([self._streamed.blocks], self._opened, closed).run(self._runs(tokens))
                if OUTSIDE in self._plans:
                    self._finish(OUTSIDE)
                self._wait()
            finally:
                for accumulator in self._watched.values():
                    accumulator.close()

    def _runs(self, tokens: CalibrationTokens) -> list[Callable[[], None]]:
        """One forward for each batch of sequences."""
        device = self._streamed.device
        batch = max(1, _TOGETHER[device.type] // tokens.ids.shape[1])
        body = self._body()

        def run(first: int) -> Callable[[], None]:
            ids = torch.from_numpy(tokens.ids[first : first + batch]).long().to(device)

            def forward() -> None:
                body(ids, use_cache=False)

            return forward

        return [run(first) for first in range(0, len(tokens.ids), batch)]

    def _body(self) -> Any:
        """What is run: the model without its head, unless a layer of the head is calibrated."""
        model, prefix = self._streamed.model, self._streamed.model.base_model_prefix
        outside = self._plans.get(OUTSIDE, ())
        if all(str(plan.module).startswith(f"{prefix}.") for plan in outside):
            return getattr(model, prefix, model)
        return model

    def _opened(self, block: str) -> None:
        self._streamed.open_ahead(block)
        if block in self._plans:
            self._watch(block, self._streamed.blocks[block])

    def _closed(self, block: str) -> None:
        if block in self._plans:
            self._finish(block)
        self._streamed.close(block)

    def _watch(self, block: str, scope: Any) -> None:
        layers = {plan.name: self._module(plan) for plan in self._plans[block]}
        self._watched[block] = HessianAccumulator(layers, scope)

    def _module(self, plan: TensorPlan) -> Any:
        assert plan.module is not None  # of every weight that is quantized
        return self._streamed.model.get_submodule(plan.module)

    def _finish(self, block: str) -> None:
        """Has the weights of a block rounded while others go on; one block waits at most."""
        accumulator = self._watched.pop(block)
        accumulator.close()
        weights = {}
        for plan in self._plans[block]:
            weight = weight_out_in(self._module(plan)).detach()
            # On the CPU the block's memory is read into again; on a device the weight stays alive.
            weights[plan.name] = weight.clone() if weight.is_cpu else weight
        self._wait()
        self._running = self._behind.submit(self._quantize, block, accumulator, weights)

    def _wait(self) -> None:
        if self._running is not None:
            with self.timed("waiting for choices"):
                self._running.result()

    def _quantize(
        self, block: str, accumulator: HessianAccumulator, weights: dict[str, torch.Tensor]
    ) -> None:
        quantized: dict[str, QuantizedWeight] = {}
        fallbacks: dict[str, str] = {}
        with torch.inference_mode():
            for leader, names in accumulator.groups().items():
                try:
                    with self.timed("guides"):
                        factor = self._factor(accumulator, leader)
                except IllConditionedError as error:
                    fallbacks |= dict.fromkeys(names, str(error))
                    continue
                with self.timed("choices"):
                    for name in names:
                        weight = self._quantizer.quantize(weights.pop(name), factor)
                        if isfinite(weight.cost):
                            quantized[name] = weight
                        else:
                            fallbacks[name] = "what rounding it costs is beyond float32"
                del factor  # before the next one takes its place
        with self.timed("writing"):
            self._store.write(block, quantized, fallbacks)

    def _factor(self, accumulator: HessianAccumulator, leader: str) -> HessianFactor:
        hessian, tokens = accumulator.take(leader), accumulator.tokens(leader)
        if hessian is None or tokens < _FEWEST:
            raise IllConditionedError(f"only {tokens} tokens came to it")
        return factorize(hessian, tokens, self._config)


def _by_block(weights: Sequence[TensorPlan], blocks: Sequence[str]) -> dict[str, list[TensorPlan]]:
    """The weights of each block, and of none."""
    plans: dict[str, list[TensorPlan]] = {}
    for plan in weights:
        block = next(
            (b for b in blocks if plan.module and plan.module.startswith(f"{b}.")), OUTSIDE
        )
        plans.setdefault(block, []).append(plan)
    return plans


@contextmanager
def deterministic_threads(device: str) -> Iterator[None]:
    """One thread for each operation of torch on the CPU: how sums are cut must not depend on it."""
    before = torch.get_num_threads()
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
