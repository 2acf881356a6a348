"""The pass through the model: block after block is rounded, for inputs from what is already."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from greenlet import getcurrent
from numpy.typing import NDArray

from nf4_pipeline.blocks.find_blocks import block_of
from nf4_pipeline.blocks.lockstep import Lockstep
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.calibration.block_inputs import (
    BlockCall,
    ExactInputs,
    InputMoments,
    moments_behind,
    moments_of,
)
from nf4_pipeline.calibration.block_store import BlockStore
from nf4_pipeline.calibration.tokens import CalibrationTokens
from nf4_pipeline.errors import RecipeError
from nf4_pipeline.gptq.config import GptqConfig
from nf4_pipeline.gptq.hessian import IllConditionedError, corrected, factorize
from nf4_pipeline.gptq.quantizer import QuantizedWeight, quantizer_for
from nf4_pipeline.model.linear import as_held, weight_out_in
from nf4_pipeline.nf4.compiling import compilation_shown
from nf4_pipeline.nf4.dequantize import dequantize_on
from nf4_pipeline.nf4.double_quant import NestedScales
from nf4_pipeline.nf4.float_bits import bits_of, dtype_name
from nf4_pipeline.nf4.rtn import round_to_nearest
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
        done = {b for b, own in plans.items() if store.is_done(b, [plan.name for plan in own])}
        if len(done) == len(plans):
            return {}
        with (
            compilation_shown(reporter),
            reporter.task("calibrate", len(streamed.blocks), unit="blocks") as task,
        ):
            work = _Pass(streamed, plans, done, store, config or GptqConfig())
            with work.timed("whole"):
                work.over(tokens, task)
        return {name: round(seconds, 2) for name, seconds in work.seconds.items()}


class _Pass:
    """One walk of all tokens through all blocks, in the 16-bit model and behind the quantized part.

    Both models share the weights of a block while it is open. The 16-bit runs pass it first; before
    the first of the others enters it, its layers are rounded one after the other, and it goes on in
    4 bit.

    Args:
        streamed: the 16-bit model.
        plans: the weights to quantize by the name of their block.
        done: the blocks of which the store has codes and scales already.
        store: receives those of the others.
        config: how they are chosen.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        plans: Mapping[str, Sequence[TensorPlan]],
        done: Collection[str],
        store: BlockStore,
        config: GptqConfig,
    ) -> None:
        self._streamed = streamed
        self._plans = plans
        self._done = done
        self._store = store
        self._config = config
        self._batch_of: dict[Any, tuple[bool, int]] = {}  # a run: is it exact, which batch
        self._tokens: list[int] = []  # of each batch
        self._calls: dict[int, BlockCall] = {}  # of the block at which the quantized runs stand
        self._open = ""
        self._exact: ExactInputs
        self._outside: ExactInputs | None = None
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
        """Walks; what a block chose is written while the next one is passed."""
        with (
            ThreadPoolExecutor(len(os.sched_getaffinity(0)), "round") as pool,
            ThreadPoolExecutor(1, "write") as behind,
            ExitStack() as stack,
        ):
            self._quantizer = quantizer_for(str(self._streamed.device), self._config, pool)
            self._behind = behind
            self._writing: Future[None] | None = None
            for block, module in self._streamed.blocks.items():
                self._hook(block, module, stack)
            if self._is_missing(OUTSIDE):
                self._outside = self._watch(OUTSIDE)
                stack.callback(self._outside.close)

            def closed(block: str) -> None:
                self._closed(block)
                task.advance(1)

            Lockstep([self._streamed.blocks], self._opened, closed, self._entered).run(
                self._runs(tokens)
            )
            if self._outside is not None:
                self._finish_outside(self._outside)
            self._wait()

    def _is_missing(self, block: str) -> bool:
        return block in self._plans and block not in self._done

    def _runs(self, tokens: CalibrationTokens) -> list[Callable[[], None]]:
        """Two forwards for each batch of sequences: in 16 bit, and behind the quantized part."""
        device = self._streamed.device
        size = max(1, _TOGETHER[device.type] // tokens.ids.shape[1])
        body = self._body()
        batches = [
            torch.from_numpy(tokens.ids[first : first + size]).long().to(device)
            for first in range(0, len(tokens.ids), size)
        ]
        self._tokens = [ids.numel() for ids in batches]

        def run(is_exact: bool, number: int, ids: torch.Tensor) -> Callable[[], None]:
            def forward() -> None:
                self._batch_of[getcurrent()] = is_exact, number
                body(ids, use_cache=False)

            return forward

        return [run(kind, i, ids) for kind in (True, False) for i, ids in enumerate(batches)]

    def _body(self) -> Any:
        """What is run: the model without its head, unless a layer of the head is calibrated."""
        model, prefix = self._streamed.model, self._streamed.model.base_model_prefix
        outside = self._plans.get(OUTSIDE, ())
        if all(str(plan.module).startswith(f"{prefix}.") for plan in outside):
            return getattr(model, prefix, model)
        return model

    def _exact_batch(self) -> int | None:
        """The batch of the 16-bit run that is going on, if it is one."""
        is_exact, number = self._batch_of.get(getcurrent(), (False, 0))
        return number if is_exact else None

    def _watch(self, block: str) -> ExactInputs:
        layers = {plan.name: self._module(plan) for plan in self._plans[block]}
        return ExactInputs(layers, self._exact_batch)

    def _module(self, plan: TensorPlan) -> Any:
        assert plan.module is not None  # of every weight that is quantized
        return self._streamed.model.get_submodule(plan.module)

    def _hook(self, block: str, module: Any, stack: ExitStack) -> None:
        """Keeps what the quantized runs give to a block, before the barrier holds them there."""

        def arrives(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            is_exact, number = self._batch_of.get(getcurrent(), (True, 0))
            if not is_exact:
                self._calls[number] = BlockCall(self._tokens[number], args, kwargs)

        stack.callback(module.register_forward_pre_hook(arrives, with_kwargs=True).remove)

    def _opened(self, block: str) -> None:
        self._streamed.open_ahead(block)
        if self._is_missing(block):
            self._exact = self._watch(block)

    def _entered(self, block: str) -> None:
        """By each run; when the first quantized one comes, the 16-bit ones have passed."""
        is_exact, _ = self._batch_of[getcurrent()]
        if is_exact or block not in self._plans or self._open == block:
            return
        self._open = block
        if block in self._done:
            self._put_stored(block)
        else:
            self._exact.close()
            self._round(block)

    def _closed(self, block: str) -> None:
        self._streamed.close(block)

    def _round(self, block: str) -> None:
        """Chooses codes and scales for a block, step by step, and puts them into it."""
        plans = {plan.name: plan for plan in self._plans[block]}
        module = self._streamed.blocks[block]
        calls = [self._calls.pop(number) for number in range(len(self._tokens))]
        quantized: dict[str, QuantizedWeight] = {}
        fallbacks: dict[str, str] = {}
        for groups in self._exact.steps():
            with self.timed("inputs"):
                moments = self._moments(module, calls, groups, plans)
            for leader, names in groups.items():
                self._exact.let_go(leader)
                self._round_group(
                    moments.pop(leader), [plans[n] for n in names], quantized, fallbacks
                )
            for name in (name for names in groups.values() for name in names):
                self._put(plans[name], quantized.get(name))
        for name in plans.keys() - quantized.keys() - fallbacks.keys():
            fallbacks[name] = "only 0 tokens came to it"
            self._put(plans[name], None)
        self._write(block, quantized, fallbacks)

    def _moments(
        self,
        module: Any,
        calls: Sequence[BlockCall],
        groups: Mapping[str, Sequence[str]],
        plans: Mapping[str, TensorPlan],
    ) -> dict[str, InputMoments]:
        if not self._config.quantized_inputs:
            return {leader: moments_of(self._exact, leader, len(calls)) for leader in groups}
        layers = {leader: self._module(plans[leader]) for leader in groups}
        return moments_behind(module, calls, layers, self._exact)

    def _round_group(
        self,
        moments: InputMoments,
        plans: Sequence[TensorPlan],
        quantized: dict[str, QuantizedWeight],
        fallbacks: dict[str, str],
    ) -> None:
        """Rounds weights that are given the same inputs."""
        tokens = moments.tokens
        try:
            with self.timed("factors"):
                hessian, drift = moments.means()
                if hessian is None or tokens < _FEWEST:
                    raise IllConditionedError(f"only {tokens} tokens came to it")
                factor = factorize(hessian, tokens, self._config)
                del hessian  # before weights take its place
        except IllConditionedError as error:
            fallbacks |= dict.fromkeys((plan.name for plan in plans), str(error))
            return
        with self.timed("choices"):
            for plan in plans:
                weight = weight_out_in(self._module(plan)).detach()
                wanted = weight
                if drift is not None and self._config.correction:
                    wanted = corrected(weight, drift, factor, self._config.correction)
                chosen = self._quantizer.quantize(wanted, factor, weight.dtype)
                if isfinite(chosen.cost):
                    quantized[plan.name] = chosen
                else:
                    fallbacks[plan.name] = "what rounding it costs is beyond float32"

    def _put(self, plan: TensorPlan, chosen: QuantizedWeight | None) -> None:
        """Gives a layer the weight that readers of the artifact will see."""
        module = self._module(plan)
        stored = None if chosen is None else (chosen.packed, chosen.scales)
        # Not in place: on a CPU the memory is that into which the file was read.
        weight = weight_in_4bit(module, plan.shape, stored)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)

    def _put_stored(self, block: str) -> None:
        """As `_round` left it, from what an earlier run kept."""
        chosen = self._store.read(block)
        for plan in self._plans[block]:
            self._put(plan, chosen.get(plan.name))

    def _finish_outside(self, inputs: ExactInputs) -> None:
        """Layers that no block holds are rounded for their inputs in the 16-bit model."""
        plans = {plan.name: plan for plan in self._plans[OUTSIDE]}
        quantized: dict[str, QuantizedWeight] = {}
        fallbacks: dict[str, str] = {}
        with torch.inference_mode():
            for groups in inputs.steps():
                for leader, names in groups.items():
                    moments = moments_of(inputs, leader, len(self._tokens))
                    self._round_group(moments, [plans[n] for n in names], quantized, fallbacks)
        for name in plans.keys() - quantized.keys() - fallbacks.keys():
            fallbacks[name] = "only 0 tokens came to it"
        self._write(OUTSIDE, quantized, fallbacks)

    def _write(
        self, block: str, quantized: dict[str, QuantizedWeight], fallbacks: dict[str, str]
    ) -> None:
        """Has a block kept while others go on; one waits at most."""
        self._wait()

        def write() -> None:
            with self.timed("writing"):
                self._store.write(block, quantized, fallbacks)

        self._writing = self._behind.submit(write)

    def _wait(self) -> None:
        if self._writing is not None:
            with self.timed("waiting for writing"):
                self._writing.result()


def _by_block(weights: Sequence[TensorPlan], blocks: Sequence[str]) -> dict[str, list[TensorPlan]]:
    """The weights of each block, and of none."""
    plans: dict[str, list[TensorPlan]] = {}
    for plan in weights:
        block = block_of(plan.module or "", blocks) or OUTSIDE
        plans.setdefault(block, []).append(plan)
    return plans


def weight_in_4bit(
    module: Any, shape: tuple[int, ...], chosen: tuple[NDArray[np.uint8], NestedScales] | None
) -> torch.Tensor:
    """The weight that readers of the artifact will see, in the shape and dtype of the module's own.

    Args:
        module: a linear layer with its 16-bit weight.
        shape: of the weight, [out_features, in_features].
        chosen: packed codes and scales; None for those of rounding to nearest.
    """
    exact = weight_out_in(module)
    if chosen is None:
        nearest = round_to_nearest(bits_of(exact), dtype_name(exact))
        chosen = nearest.packed, nearest.scales
    packed, scales = chosen
    weight = dequantize_on(exact.device, packed, scales.scales(), shape).to(exact.dtype)
    held: torch.Tensor = as_held(module, weight)
    return held


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
