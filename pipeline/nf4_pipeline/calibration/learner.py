"""The loop in which codes learn: the 4-bit model follows the 16-bit model's own distribution.

The loss is KL(16 bit || 4 bit) over the whole vocabulary, the mean over all tokens of a step. Every
eighth of the way the KL on samples that are held back is measured; the codes with the least are
what comes of it, and if it rises, learning goes back to them with half the rate.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from math import cos, isfinite, pi
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.checkpoint import checkpoint

from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.calibration.latents import LearnedWeight, Tables
from nf4_pipeline.calibration.learning_plan import LearningPlan
from nf4_pipeline.calibration.learning_state import Progress, read_state, write_state
from nf4_pipeline.checkpoint.atomic import make_folder
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.gptq.saved_codes import read_codes
from nf4_pipeline.model.linear import as_held, weight_out_in
from nf4_pipeline.nf4.float_bits import bits_of, dtype_name
from nf4_pipeline.nf4.rtn import round_to_nearest
from nf4_pipeline.progress import Reporter
from nf4_pipeline.resource_usage import free_space
from nf4_pipeline.selection import TensorPlan

_CHECKS: Final = 8  # how often held-back samples are measured
_WARM_UP: Final = 0.1  # of the steps
_HARM: Final = 1.5  # times the KL at the start
_HALVINGS: Final = 2
_AT_ONCE: Final = {"cpu": 2**22, "cuda": 2**26}
"""Predictions that are compared at once, in float32."""
_SECONDS: Final = 8.0  # of work that a kill may cost, where a state is written fast
_SHARE: Final = 4.0  # at least so many times as long between two states as writing one takes
_RATE: Final = 5e8  # bytes per second that a disk is thought to take until it is known
_CUBLAS: Final = "CUBLAS_WORKSPACE_CONFIG"
_NO_SUCH: Final = "does not have a deterministic implementation"

Saved = Callable[[Progress], None]
"""Told of each state that was written."""


def learning_dtype(device: str) -> torch.dtype:
    """What is computed in."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def hold_all(streamed: StreamedModel) -> None:
    """Gives all blocks their weights."""
    for block in streamed.blocks:
        streamed.hold(block)


def learning_rate(plan: LearningPlan, step: int) -> float:
    """Of a step, from 0: it rises over the first tenth, and falls as a cosine to nothing."""
    done = (step + 1) / plan.steps
    fallen = max(0.0, (done - _WARM_UP) / (1 - _WARM_UP))
    return plan.rate * min(1.0, done / _WARM_UP) * (1 + cos(pi * fallen)) / 2


def order_of(plan: LearningPlan, seed: int = 0) -> NDArray[np.int64]:
    """The sequences of each step, [steps, batch]: all of them in turn, shuffled for each pass."""
    rng = np.random.default_rng(seed)
    needed = plan.steps * plan.batch
    passes = [rng.permutation(plan.sequences) for _ in range(-(-needed // plan.sequences))]
    return np.concatenate(passes)[:needed].reshape(plan.steps, plan.batch)


class Learner:
    """Two models on a device, the 16-bit one and that of the codes.

    Args:
        teacher: the 16-bit model; all its blocks are held.
        student: another one of the same checkpoint; it becomes the 4-bit one.
        learned: the weights that learn.
        rounded: weights that are rounded to nearest, and stay so.
        files: name of a weight that learns -> the file with the codes that it begins with.
        plan: how it learns.
        ids: what is learned from, int32 [sequences, length].
        held_back: what is measured, int32 [sequences, length].
    """

    def __init__(
        self,
        teacher: StreamedModel,
        student: StreamedModel,
        learned: Sequence[TensorPlan],
        rounded: Sequence[TensorPlan],
        files: Mapping[str, Path],
        plan: LearningPlan,
        ids: NDArray[np.int32],
        held_back: NDArray[np.int32],
    ) -> None:
        self._teacher = teacher
        self._student = student
        self._plan = plan
        self._ids = ids
        self._held_back = held_back
        self._device = student.device
        tables = Tables(self._device)
        student.model.requires_grad_(False)
        self._modules = {w.name: teacher.model.get_submodule(str(w.module)) for w in learned}
        self._weights: dict[str, LearnedWeight] = {}
        self.best: dict[str, NDArray[np.uint8]] = {}
        for weight in rounded:
            module = student.model.get_submodule(str(weight.module))
            exact = weight_out_in(module)
            nearest = round_to_nearest(bits_of(exact), dtype_name(exact)).dequantize()
            module.weight.data.copy_(as_held(module, torch.from_numpy(nearest)))
        for weight in learned:
            module = student.model.get_submodule(str(weight.module))
            packed, scales = read_codes(files[weight.name], weight.name)
            exact = weight_out_in(self._modules[weight.name]).detach()
            self._weights[weight.name] = LearnedWeight(
                module, exact, packed, scales.scales(), tables
            )
            self.best[weight.name] = packed
            if self._device.type != "cpu":
                module.weight.register_hook(self._weights[weight.name].watch)
        if plan.recompute:
            for block in student.blocks.values():
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        self.progress = Progress()

    def run(
        self,
        path: Path,
        reporter: Reporter,
        *,
        seconds: float = _SECONDS,
        saved: Saved | None = None,
    ) -> Progress:
        """Learns, or goes on learning; `best` then holds the codes that came of it.

        Args:
            path: of the state that a killed run goes on from.
            reporter: told how far it is.
            seconds: between two states, at least.
            saved: told of each state.

        Raises:
            CheckpointError: the model's predictions are not finite, or its gradients cannot be
                computed.
        """
        with (
            ExitStack() as stack,
            reporter.task("learn codes", self._plan.steps, unit="steps") as task,
        ):
            stack.enter_context(_deterministic(self._device))
            cores = len(os.sched_getaffinity(0)) if self._device.type == "cpu" else 1
            self._pool = stack.enter_context(ThreadPoolExecutor(min(cores, 8), "learn"))
            keeper = _Keeper(path, self._state_bytes(), seconds, reporter, saved)
            if not self._resume(path):
                start = self._held_back_kl()
                if not isfinite(start):
                    raise CheckpointError(
                        "The predictions of the 16-bit or the 4-bit model on held-back samples are "
                        "not finite, so codes cannot learn from them. Leave --effort out."
                    )
                self.progress = Progress(start_kl=start, best_kl=start)
            task.advance(self.progress.step)
            order = order_of(self._plan)
            checks = {-(-self._plan.steps * n // _CHECKS) for n in range(1, _CHECKS + 1)}
            while self.progress.step < self._plan.steps and not self.progress.ended:
                step = self.progress.step
                self._learn(self._ids[order[step]], reporter)
                self.progress = replace(self.progress, step=step + 1, since=self.progress.since + 1)
                if step + 1 in checks:
                    self._check(reporter)
                task.advance(1)
                keeper.keep_if_due(self.progress, self._arrays)
            keeper.keep(self.progress, self._arrays)
        return self.progress

    def _learn(self, ids: NDArray[np.int32], reporter: Reporter) -> None:
        """One step."""
        for weight in self._weights.values():
            weight.decay()
        try:
            self._add_gradients(ids)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or self.progress.step:
                raise
            if _NO_SUCH not in str(error):
                raise CheckpointError(
                    "The gradients of this model cannot be computed "
                    f"({str(error).splitlines()[0][:200]}), so its codes cannot learn. Leave "
                    "--effort out."
                ) from error
            reporter.note(
                "A part of this model has no deterministic gradient on this device, so that a "
                f"second run may learn other codes: {str(error).splitlines()[0][:120]}"
            )
            torch.use_deterministic_algorithms(True, warn_only=True)
            for weight in self._weights.values():
                weight.momentum.zero_()
            self._add_gradients(ids)
        rate = learning_rate(self._plan, self.progress.step) / 2**self.progress.halvings
        for weight in self._weights.values():
            weight.step(rate, self.progress.since + 1)

    def _add_gradients(self, ids: NDArray[np.int32]) -> None:
        """Adds the gradients of the mean loss over some sequences to momentum."""
        parts = self._parts(ids)
        weights = list(self._weights.values())
        parameters = [weight.module.weight for weight in weights]
        if self._device.type != "cpu":
            for weight, parameter in zip(weights, parameters, strict=True):
                parameter.grad = weight.momentum  # added to in place
            for part in parts:
                own, gradient = self._compared(part, ids.size)
                torch.autograd.backward(own, gradient)
            return

        def gradients(part: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            own, gradient = self._compared(part, ids.size)
            found: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
                own, parameters, gradient, allow_unused=True
            )
            return found

        # Added one after the other, whichever comes first.
        for found in self._pool.map(gradients, parts):
            for weight, added in zip(weights, found, strict=True):
                if added is not None:
                    weight.add(added)

    def _parts(self, ids: NDArray[np.int32]) -> list[torch.Tensor]:
        rows = max(1, self._plan.together // ids.shape[1])
        return list(torch.split(torch.from_numpy(ids).long().to(self._device), rows))

    def _compared(self, ids: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The 4-bit model's logits, and the gradient of the loss by them.

        Args:
            ids: some sequences.
            tokens: of the whole step.
        """
        expected = self._expected(ids)
        own = self._student.model(ids, use_cache=False).logits
        gradient = torch.empty(own.shape, dtype=own.dtype, device=own.device)
        for theirs, mine, into in _pieces(expected, own.detach(), gradient):
            into.copy_((mine.float().softmax(-1) - theirs.float().softmax(-1)).div_(tokens))
        return own, gradient

    def _expected(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self._teacher.model(ids, use_cache=False).logits
        return logits

    def _held_back_kl(self) -> float:
        """Nats per token."""

        def measure(part: torch.Tensor) -> float:
            with torch.no_grad():
                expected = self._expected(part)
                own = self._student.model(part, use_cache=False).logits
                total = torch.zeros((), dtype=torch.float64, device=self._device)
                for theirs, mine in _pieces(expected, own):
                    p, q = theirs.float().log_softmax(-1), mine.float().log_softmax(-1)
                    total += (p.exp() * (p - q)).sum(-1).sum(dtype=torch.float64)
                return float(total)

        sums = list(self._pool.map(measure, self._parts(self._held_back)))
        return sum(sums) / self._held_back.size

    def _check(self, reporter: Reporter) -> None:
        """Measures held-back samples: keeps the best codes, and goes back to them after harm."""
        found = self._held_back_kl()
        reporter.detail(f"Step {self.progress.step}: KL on held-back samples {found:.6f}.")
        if found < self.progress.best_kl:
            self.best = {name: weight.packed() for name, weight in self._weights.items()}
            self.progress = replace(self.progress, best_kl=found)
        if isfinite(found) and found <= _HARM * self.progress.start_kl:
            return
        if self.progress.halvings == _HALVINGS:
            self.progress = replace(self.progress, ended=True)
            return
        reporter.note(
            f"Learning did harm (KL on held-back samples {found:.4g}, at the start "
            f"{self.progress.start_kl:.4g}): it goes on from the best codes, with half the rate."
        )
        self.progress = replace(self.progress, since=0, halvings=self.progress.halvings + 1)
        for name, weight in self._weights.items():
            weight.begin(weight_out_in(self._modules[name]).detach(), self.best[name])

    def _state_bytes(self) -> int:
        return sum(
            weight.latent.nbytes + weight.momentum.nbytes + weight.latent.nbytes // 4
            for weight in self._weights.values()
        )

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """All that a step depends on."""
        arrays: dict[str, NDArray[Any]] = {}
        for name, weight in self._weights.items():
            arrays[f"{name}:latent"] = weight.latent.cpu().numpy()
            arrays[f"{name}:momentum"] = bits_of(weight.momentum)
            arrays[f"{name}:rows"] = weight.rows.cpu().numpy()
            arrays[f"{name}:columns"] = weight.columns.cpu().numpy()
            arrays[f"{name}:best"] = self.best[name]
        return arrays

    def _resume(self, path: Path) -> bool:
        """Takes up what an earlier run kept, if it kept something of these weights."""
        kept = read_state(path)
        if kept is None:
            return False
        progress, arrays = kept
        here = {name: (array.dtype, array.shape) for name, array in self._arrays().items()}
        if here != {name: (array.dtype, array.shape) for name, array in arrays.items()}:
            return False
        for name, weight in self._weights.items():
            for part in ("latent", "rows", "columns"):
                getattr(weight, part).copy_(torch.from_numpy(arrays[f"{name}:{part}"]))
            momentum = torch.from_numpy(arrays[f"{name}:momentum"].view(np.uint8).reshape(-1))
            held = momentum.view(weight.momentum.dtype).view(weight.momentum.shape)
            weight.momentum.copy_(held)
            weight.dequantize()
            self.best[name] = arrays[f"{name}:best"]
        self.progress = progress
        return True


class _Keeper:
    """Writes states, not more often than it pays, and not at all where the disk is too small.

    Args:
        path: of the file.
        nbytes: of a state.
        seconds: between two states, at least.
        reporter: told if none can be kept.
        saved: told of each.
    """

    def __init__(
        self, path: Path, nbytes: int, seconds: float, reporter: Reporter, saved: Saved | None
    ) -> None:
        self._path = path
        self._saved = saved
        self._between = seconds if not seconds else max(seconds, _SHARE * nbytes / _RATE)
        self._last = time.monotonic()
        # The earlier one stands until the next is whole.
        self._room = 2 * nbytes < free_space(path.parent)
        if not self._room:
            reporter.note(
                f"The disk of {path.parent} has no room for {2 * nbytes / 1e9:.1f} GB: if this run "
                "is stopped, codes learn from the beginning."
            )

    def keep_if_due(
        self, progress: Progress, arrays: Callable[[], Mapping[str, NDArray[Any]]]
    ) -> None:
        """Writes a state if it is time."""
        if time.monotonic() - self._last >= self._between:
            self.keep(progress, arrays)

    def keep(self, progress: Progress, arrays: Callable[[], Mapping[str, NDArray[Any]]]) -> None:
        """Writes a state."""
        if not self._room:
            return
        make_folder(self._path.parent)
        began = time.monotonic()
        write_state(self._path, progress, arrays())
        self._last = time.monotonic()
        if self._between:
            self._between = max(self._between, _SHARE * (self._last - began))
        if self._saved is not None:
            self._saved(progress)


def _pieces(*logits: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Some tokens at a time of tensors [..., vocabulary], as views [tokens, vocabulary]."""
    words = logits[0].shape[-1]
    rows = max(1, _AT_ONCE[logits[0].device.type] // words)
    return zip(*(torch.split(each.reshape(-1, words), rows) for each in logits), strict=True)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """The same sums each time: one thread for each operation of a CPU, fixed kernels on a GPU."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
        return
    fill: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), fill.fill_uninitialized_memory
    warned, known = torch.is_deterministic_algorithms_warn_only_enabled(), os.environ.get(_CUBLAS)
    os.environ.setdefault(_CUBLAS, ":4096:8")
    torch.use_deterministic_algorithms(True)
    fill.fill_uninitialized_memory = False  # what is empty is written before it is read
    try:
        with warnings.catch_warnings():
            # Said by the thread that goes backward, which then takes the context that there is.
            warnings.filterwarnings("ignore", "Attempting to run cuBLAS")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warned)
        fill.fill_uninitialized_memory = before[1]
        if known is None:
            os.environ.pop(_CUBLAS, None)
