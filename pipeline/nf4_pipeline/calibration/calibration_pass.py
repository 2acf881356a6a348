"""The pass through the model: block after block is rounded, for inputs from what is already."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from greenlet import getcurrent
from numpy.typing import NDArray

from nf4_pipeline.blocks.find_blocks import block_of
from nf4_pipeline.blocks.lockstep import Lockstep
from nf4_pipeline.blocks.model_replica import ModelReplica
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.calibration.block_inputs import (
    BlockCall,
    ExactInputs,
    InputMoments,
    LayerInputs,
    inputs_behind,
    inputs_of,
)
from nf4_pipeline.calibration.block_store import BlockStore
from nf4_pipeline.calibration.tokens import CalibrationTokens
from nf4_pipeline.errors import RecipeError
from nf4_pipeline.gptq.config import GptqConfig
from nf4_pipeline.gptq.device_group import DeviceGroup, Division
from nf4_pipeline.gptq.hessian import IllConditionedError, corrected, factorize
from nf4_pipeline.gptq.quantizer import QuantizedWeight
from nf4_pipeline.gptq.quantizers import GptqQuantizer, quantizer_for
from nf4_pipeline.gptq.scale_limits import scale_limits
from nf4_pipeline.model.linear import as_held, weight_out_in
from nf4_pipeline.nf4.compiling import compilation_shown
from nf4_pipeline.nf4.dequantize import dequantize_on
from nf4_pipeline.nf4.float_bits import bits_of, dtype_name
from nf4_pipeline.nf4.rtn import round_to_nearest
from nf4_pipeline.progress import Reporter, Task
from nf4_pipeline.runtime.determinism import deterministic
from nf4_pipeline.selection import TensorPlan

OUTSIDE: Final = "outside"
"""Stands for a block where layers are meant that no block holds."""
TOGETHER: Final = {"cpu": 2048, "cuda": 4096}
"""Tokens that run at once on a device, whatever the number of devices. Others give other bytes."""
_FEWEST: Final = 64
"""Tokens below which a layer's inputs say too little: it is rounded to nearest."""


def calibrate(
    folder: Path,
    weights: Sequence[TensorPlan],
    tokens: CalibrationTokens,
    store: BlockStore,
    *,
    devices: Sequence[str],
    reporter: Reporter,
    config: GptqConfig | None = None,
    division: Division | None = None,
) -> dict[str, float]:
    """Chooses codes and scales for all weights; what the store has already is left as it is.

    Several devices of one kind choose what one of them does: batches of tokens are dealt to them,
    and of each layer's work the pieces of `gptq.device_group`.

    Args:
        folder: the 16-bit checkpoint.
        weights: what is quantized.
        tokens: what the model reads.
        store: receives them.
        devices: "cpu", or "cuda:N" for each GPU of one kind.
        reporter: told how far it is.
        config: how; the default is the recipe's.
        division: how the work on a layer is cut; the default is that of the kind of device.

    Returns:
        Where the time went, in seconds: "whole", and, beside each other, what the parts took.

    Raises:
        RecipeError: a token is beyond the model's vocabulary.
    """
    with (
        # Codes and scales are chosen for weights as they are stored.
        StreamedModel(folder, devices[0], rescales=False) as streamed,
        deterministic(devices[0]),
    ):
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
            copies = [ModelReplica(streamed, torch.device(device)) for device in devices[1:]]
            work = _Pass(streamed, copies, plans, done, store, config or GptqConfig(), division)
            with work.timed("whole"):
                work.over(tokens, task)
        return {name: round(seconds, 2) for name, seconds in work.seconds.items()}


@dataclass
class _Results:
    """What was chosen for the weights of a block.

    Attributes:
        quantized: codes and scales by the name of the weight.
        fallbacks: name of each other weight -> why it is rounded to nearest.
        absent: those of them to which nothing came.
    """

    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)

    def add(self, other: _Results) -> None:
        """Takes up what another device chose."""
        self.quantized |= other.quantized
        self.fallbacks |= other.fallbacks


@dataclass(frozen=True)
class _Team:
    """Those who share the work on some weights.

    Attributes:
        group: their devices.
        models: the number of the model on each of these.
        quantizer: for these.
    """

    group: DeviceGroup
    models: Sequence[int]
    quantizer: GptqQuantizer


class _Pass:
    """One walk of all tokens through all blocks, in the 16-bit model and behind the quantized part.

    Both models share the weights of a block while it is open. The 16-bit runs pass it first; before
    the first of the others enters it, its layers are rounded one after the other, and it goes on in
    4 bit.

    Args:
        streamed: the 16-bit model, on the device that leads.
        copies: of it, on the other devices.
        plans: the weights to quantize by the name of their block.
        done: the blocks of which the store has codes and scales already.
        store: receives those of the others.
        config: how they are chosen.
        division: how the work on a layer is cut; None for that of the kind of device.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        copies: Sequence[ModelReplica],
        plans: Mapping[str, Sequence[TensorPlan]],
        done: Collection[str],
        store: BlockStore,
        config: GptqConfig,
        division: Division | None,
    ) -> None:
        self._streamed = streamed
        self._copies = copies
        self._models: list[StreamedModel | ModelReplica] = [streamed, *copies]
        self._plans = plans
        self._done = done
        self._store = store
        self._config = config
        self._division = division
        self._batch_of: dict[Any, tuple[bool, int]] = {}  # a run: is it exact, which batch
        self._tokens: list[int] = []  # of each batch
        self._calls: dict[int, BlockCall] = {}  # of the block at which the quantized runs stand
        self._open = ""
        self._exact: ExactInputs
        self._outside: ExactInputs | None = None
        self.seconds: dict[str, float] = {}
        self._adding = threading.Lock()

    @contextmanager
    def timed(self, part: str, group: DeviceGroup | None = None) -> Iterator[None]:
        """Adds the time of the body to a part; what devices still do for it is waited for."""
        start = time.perf_counter()
        try:
            yield
            if group is not None:
                group.wait()
        finally:
            spent = time.perf_counter() - start
            with self._adding:
                self.seconds[part] = self.seconds.get(part, 0.0) + spent

    def over(self, tokens: CalibrationTokens, task: Task) -> None:
        """Walks; what a block chose is written while the next one is passed."""
        with (
            ThreadPoolExecutor(len(os.sched_getaffinity(0)), "round") as pool,
            ThreadPoolExecutor(1, "write") as behind,
            ThreadPoolExecutor(len(self._models), "device") as side_by_side,
            ExitStack() as stack,
        ):
            devices = [model.device for model in self._models]
            self._group = DeviceGroup(devices, self._division, side_by_side)
            self._quantizer = quantizer_for(self._group, self._config, pool)
            self._alone = [
                quantizer_for(self._group.alone(index), self._config, pool)
                for index in range(len(devices))
            ]
            self._behind = behind
            self._writing: Future[None] | None = None
            for model in self._models:
                for module in model.blocks.values():
                    self._hook(module, stack)
            if self._is_missing(OUTSIDE):
                self._outside = self._watch(OUTSIDE)
                stack.callback(self._outside.close)

            def closed(block: str) -> None:
                self._closed(block)
                task.advance(1)

            blocks = [model.blocks for model in self._models]
            Lockstep(blocks, self._opened, closed, self._entered).run(self._runs(tokens))
            if self._outside is not None:
                self._finish_outside(self._outside)
            self._wait()

    def _is_missing(self, block: str) -> bool:
        return block in self._plans and block not in self._done

    def _runs(self, tokens: CalibrationTokens) -> list[Callable[[], None]]:
        """Two forwards for each batch of sequences: in 16 bit, and behind the quantized part."""
        size = max(1, TOGETHER[self._streamed.device.type] // tokens.ids.shape[1])
        bodies = [self._body(model.model) for model in self._models]
        batches = [
            torch.from_numpy(tokens.ids[first : first + size]).long()
            for first in range(0, len(tokens.ids), size)
        ]
        self._tokens = [ids.numel() for ids in batches]

        def run(is_exact: bool, number: int, ids: torch.Tensor) -> Callable[[], None]:
            home = self._home(number)
            given = ids.to(self._models[home].device)

            def forward() -> None:
                self._batch_of[getcurrent()] = is_exact, number
                bodies[home](given, use_cache=False)

            return forward

        return [run(kind, i, ids) for kind in (True, False) for i, ids in enumerate(batches)]

    def _home(self, batch: int) -> int:
        """The number of the model that a batch is given to."""
        return batch % len(self._models)

    def _body(self, model: Any) -> Any:
        """What is run: the model without its head, unless a layer of the head is calibrated."""
        prefix = model.base_model_prefix
        outside = self._plans.get(OUTSIDE, ())
        if all(str(plan.module).startswith(f"{prefix}.") for plan in outside):
            return getattr(model, prefix, model)
        return model

    def _exact_batch(self) -> int | None:
        """The batch of the 16-bit run that is going on, if it is one."""
        is_exact, number = self._batch_of.get(getcurrent(), (False, 0))
        return number if is_exact else None

    def _watch(self, block: str) -> ExactInputs:
        layers = [
            {plan.name: self._module(plan, number) for plan in self._plans[block]}
            for number in range(len(self._models))
        ]
        return ExactInputs(layers, self._exact_batch)

    def _module(self, plan: TensorPlan, number: int) -> Any:
        """A layer in one of the models."""
        assert plan.module is not None  # of every weight that is quantized
        return self._models[number].model.get_submodule(plan.module)

    def _hook(self, module: Any, stack: ExitStack) -> None:
        """Keeps what the quantized runs give to a block, before the barrier holds them there."""

        def arrives(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            is_exact, number = self._batch_of.get(getcurrent(), (True, 0))
            if not is_exact:
                self._calls[number] = BlockCall(self._tokens[number], args, kwargs)

        stack.callback(module.register_forward_pre_hook(arrives, with_kwargs=True).remove)

    def _opened(self, block: str) -> None:
        self._streamed.open_ahead(block)
        for replica in self._copies:
            replica.open(block)
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
        for model in self._models[::-1]:
            model.close(block)

    def _round(self, block: str) -> None:
        """Chooses codes and scales for a block, step by step, and puts them into it."""
        plans = {plan.name: plan for plan in self._plans[block]}
        calls = {number: self._calls.pop(number) for number in range(len(self._tokens))}
        results = _Results()
        for groups in self._exact.steps():
            with self.timed("inputs", self._group):
                inputs = self._inputs(block, calls, groups, plans)
            for leader in groups:
                self._exact.let_go(leader)
            self._round_step(inputs, groups, plans, results)
            with self.timed("inputs", self._group):
                self._put(
                    [plans[name] for names in groups.values() for name in names], results.quantized
                )
        self._add_absent(plans, results)
        self._put([plans[name] for name in results.absent], {})
        self._write(block, results)

    def _inputs(
        self,
        block: str,
        calls: Mapping[int, BlockCall],
        groups: Mapping[str, Sequence[str]],
        plans: Mapping[str, TensorPlan],
    ) -> dict[str, LayerInputs]:
        """What comes to the leaders of groups."""
        if not self._config.quantized_inputs:
            return {leader: inputs_of(self._exact, leader, len(calls)) for leader in groups}

        def run(index: int) -> dict[int, dict[str, LayerInputs]]:
            module = self._models[index].blocks[block]
            layers = {leader: self._module(plans[leader], index) for leader in groups}
            own = {number: call for number, call in calls.items() if self._home(number) == index}
            return inputs_behind(module, own, layers, self._exact)

        found = {number: kept for own in self._group.each(run) for number, kept in own.items()}
        return {
            leader: LayerInputs([pair for n in sorted(found) for pair in found[n][leader].calls])
            for leader in groups
        }

    def _round_step(
        self,
        inputs: dict[str, LayerInputs],
        groups: Mapping[str, Sequence[str]],
        plans: Mapping[str, TensorPlan],
        results: _Results,
    ) -> None:
        """Rounds the weights of a step, none of which is behind another one.

        All devices share the work on a group of weights; if there are more groups than devices, as
        of experts, each device has groups of its own.
        """
        weights = {leader: [plans[name] for name in names] for leader, names in groups.items()}
        whole = _Team(self._group, range(len(self._group)), self._quantizer)
        if len(groups) <= len(self._group) or len(self._group) == 1:
            for leader in groups:
                self._round_group(inputs.pop(leader), weights[leader], whole, results)
            return
        leaders = list(groups)
        dealt = [leaders[index :: len(self._group)] for index in range(len(self._group))]
        # Before any of them begins: what is copied waits for all that its device was given to do.
        there = [
            {leader: inputs.pop(leader).to(device) for leader in own}
            for device, own in zip(self._group.devices, dealt, strict=True)
        ]

        def work(index: int) -> _Results:
            found = _Results()
            team = _Team(self._group.alone(index), [index], self._alone[index])
            for leader in dealt[index]:
                self._round_group(there[index].pop(leader), weights[leader], team, found)
            return found

        for found in self._group.each(work):
            results.add(found)

    def _round_group(
        self, inputs: LayerInputs, plans: Sequence[TensorPlan], team: _Team, results: _Results
    ) -> None:
        """Rounds weights that are given the same inputs."""
        group, tokens = team.group, inputs.tokens
        try:
            if tokens < _FEWEST:
                raise IllConditionedError(f"only {tokens} tokens came to it")
            with self.timed("sums", group):
                moments = InputMoments(inputs, group)
                inputs.calls.clear()
                hessian = moments.hessian()
            with self.timed("factors", group):
                factor = factorize(hessian, tokens, self._config, group, moments.add_drift)
                del hessian  # before weights take its place
                drift = moments.drift() if self._config.correction else None
                factors = [factor.to(device) for device in group.devices]
                drifts = [None if drift is None else drift.to(device) for device in group.devices]
                del moments, drift
        except IllConditionedError as error:
            results.fallbacks |= dict.fromkeys((plan.name for plan in plans), str(error))
            return
        for plan in plans:
            shares = [pieces for pieces in group.shares(plan.shape[0]) if pieces]

            def wanted(index: int, plan: TensorPlan = plan, shares: Any = shares) -> torch.Tensor:
                weight: torch.Tensor = weight_out_in(self._module(plan, team.models[index]))
                if index >= len(shares):
                    return weight[:0]
                drift = drifts[index]
                if drift is None:
                    return weight[shares[index][0].start : shares[index][-1].stop]
                share = self._config.correction
                rows = [corrected(weight[p], drift, factors[index], share) for p in shares[index]]
                return rows[0] if len(rows) == 1 else torch.cat(rows)

            with self.timed("corrections", group):
                rows = group.each(wanted)[: len(shares)]
            with self.timed("choices"):
                limits = scale_limits(weight_out_in(self._module(plan, team.models[0])))
                chosen = team.quantizer.quantize(rows, factors, limits)
            if isfinite(chosen.cost):
                results.quantized[plan.name] = chosen
            else:
                results.fallbacks[plan.name] = "what rounding it costs is beyond float32"

    def _put(self, plans: Sequence[TensorPlan], quantized: Mapping[str, QuantizedWeight]) -> None:
        """Gives layers the weights that readers of the artifact will see, in each model."""
        stored = {}
        for plan in plans:
            chosen = quantized.get(plan.name)
            stored[plan.name] = (
                nearest(self._module(plan, 0))
                if chosen is None
                else (chosen.packed, chosen.scales.scales())
            )

        def put(index: int) -> None:
            for plan in plans:
                module = self._module(plan, index)
                # Not in place: on a CPU the memory is that into which the file was read.
                weight = weight_in_4bit(module, plan.shape, stored[plan.name])
                module.weight = torch.nn.Parameter(weight, requires_grad=False)

        self._group.each(put)

    def _put_stored(self, block: str) -> None:
        """As `_round` left it, from what an earlier run kept."""
        self._put(self._plans[block], self._store.read(block))

    def _finish_outside(self, inputs: ExactInputs) -> None:
        """Layers that no block holds are rounded for their inputs in the 16-bit model."""
        plans = {plan.name: plan for plan in self._plans[OUTSIDE]}
        results = _Results()
        with torch.inference_mode():
            for groups in inputs.steps():
                found = {name: inputs_of(inputs, name, len(self._tokens)) for name in groups}
                self._round_step(found, groups, plans, results)
        self._add_absent(plans, results)
        self._write(OUTSIDE, results)

    def _add_absent(self, plans: Mapping[str, TensorPlan], results: _Results) -> None:
        """Notes weights whose layers were never called."""
        results.absent = sorted(plans.keys() - results.quantized.keys() - results.fallbacks.keys())
        results.fallbacks |= dict.fromkeys(results.absent, "only 0 tokens came to it")

    def _write(self, block: str, results: _Results) -> None:
        """Has a block kept while others go on; one waits at most."""
        self._wait()

        def write() -> None:
            with self.timed("writing"):
                self._store.write(block, results.quantized, results.fallbacks)

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
    module: Any,
    shape: tuple[int, ...],
    chosen: tuple[NDArray[np.uint8], NDArray[np.float32]] | None,
) -> torch.Tensor:
    """The weight that readers of the artifact will see, in the shape and dtype of the module's own.

    Args:
        module: a linear layer with its 16-bit weight.
        shape: of the weight, [out_features, in_features].
        chosen: packed codes, and scales as readers compute them; None for those of rounding to
            nearest.
    """
    exact = weight_out_in(module)
    packed, scales = nearest(module) if chosen is None else chosen
    weight = dequantize_on(exact.device, packed, scales, shape).to(exact.dtype)
    held: torch.Tensor = as_held(module, weight)
    return held


def nearest(module: Any) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Packed codes and scales, as `weight_in_4bit` takes them, of rounding to nearest."""
    exact = weight_out_in(module)
    found = round_to_nearest(bits_of(exact), dtype_name(exact))
    return found.packed, found.scales.scales()
