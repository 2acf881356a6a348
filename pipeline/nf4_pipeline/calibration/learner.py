"""The loop in which codes learn: the 4-bit model follows the 16-bit model's own distribution.

The loss is KL(16 bit || 4 bit) over the whole vocabulary, the mean over all tokens of a step. Every
eighth of the way the KL on samples that are held back is measured; the codes with the least are
what comes of it, and if it rises, learning goes back to them with half the rate.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from math import cos, isfinite, pi
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from nf4_pipeline.calibration.latents import STATE, LearnedWeight
from nf4_pipeline.calibration.learning_loss import Gradients
from nf4_pipeline.calibration.learning_plan import LearningPlan
from nf4_pipeline.calibration.learning_state import Progress, read_state, write_state
from nf4_pipeline.calibration.learning_tokens import LearningTokens
from nf4_pipeline.checkpoint.atomic import make_folder
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.progress import Reporter
from nf4_pipeline.resource_usage import free_space
from nf4_pipeline.runtime.determinism import deterministic

_CHECKS: Final = 8  # how often held-back samples are measured
_WARM_UP: Final = 0.1  # of the steps
_HARM: Final = 1.5  # times the KL at the start
_HALVINGS: Final = 2
_SECONDS: Final = 8.0  # of work that a kill may cost, where a state is written fast
_SHARE: Final = 4.0  # at least so many times as long between two states as writing one takes
_RATE: Final = 5e8  # bytes per second that a disk is thought to take until it is known

Saved = Callable[[Progress], None]
"""Told of each state that was written."""


def learning_dtype(device: str) -> torch.dtype:
    """What is computed in."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


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


class Models(Protocol):
    """The 16-bit model and that of the codes, wherever they are.

    Attributes:
        weights: those that learn, by name.
        device: where they take their steps.
    """

    weights: dict[str, LearnedWeight]
    device: torch.device

    def learn(
        self,
        ids: NDArray[np.int32],
        gradients: Gradients,
        step: Callable[[LearnedWeight], None],
    ) -> None:
        """Adds the gradients of the mean loss to momentum, and has each weight take its step."""

    def kl(self, ids: NDArray[np.int32], pool: Executor) -> float:
        """KL(16 bit || 4 bit), nats per token."""

    def begin_again(self, codes: Mapping[str, NDArray[np.uint8]]) -> None:
        """Puts all latents into the bins of codes."""


class Learner:
    """Lets the codes of a model learn.

    Args:
        models: both of them.
        tokens: what is learned from, and how.

    Attributes:
        progress: where learning stands.
        best: the codes with the least KL on what is held back.
    """

    def __init__(self, models: Models, tokens: LearningTokens) -> None:
        self._models = models
        self._plan = tokens.plan
        self._ids = tokens.ids
        self._held_back = tokens.held_back
        self._device = models.device
        self.best = {name: weight.packed() for name, weight in models.weights.items()}
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
            stack.enter_context(deterministic(self._device, strict=True))
            cores = len(os.sched_getaffinity(0)) if self._device.type == "cpu" else 1
            self._pool = stack.enter_context(ThreadPoolExecutor(min(cores, 8), "learn"))
            gradients = Gradients(self._device, self._pool, reporter)
            keeper = _Keeper(path, self._state_bytes(), seconds, reporter, saved)
            if not self._resume(path):
                start = self._held_back_kl()
                if not isfinite(start):
                    raise CheckpointError(
                        "The predictions of the 16-bit or the 4-bit model on held-back samples are "
                        "not finite, so codes cannot learn from them. Leave --effort out."
                    )
                self.progress = Progress(start_kl=start, best_kl=start)
            if not self.progress.repeatable:
                gradients.allow_others()
            task.advance(self.progress.step)
            order = order_of(self._plan)
            checks = {-(-self._plan.steps * n // _CHECKS) for n in range(1, _CHECKS + 1)}
            while self.progress.step < self._plan.steps and not self.progress.ended:
                self._step(self._ids[order[self.progress.step]], gradients)
                if self.progress.step in checks:
                    self._check(reporter)
                task.advance(1)
                keeper.keep_if_due(self.progress, self._arrays)
            keeper.keep(self.progress, self._arrays)
        return self.progress

    def _step(self, ids: NDArray[np.int32], gradients: Gradients) -> None:
        """One step."""
        rate = learning_rate(self._plan, self.progress.step) / 2**self.progress.halvings
        number = self.progress.since + 1
        self._models.learn(ids, gradients, lambda weight: weight.step(rate, number))
        gradients.proven = True
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            since=number,
            repeatable=gradients.repeatable,
        )

    def _held_back_kl(self) -> float:
        return self._models.kl(self._held_back, self._pool)

    def _check(self, reporter: Reporter) -> None:
        """Measures held-back samples: keeps the best codes, and goes back to them after harm."""
        found = self._held_back_kl()
        reporter.detail(f"Step {self.progress.step}: KL on held-back samples {found:.6f}.")
        if found < self.progress.best_kl:
            self.best = {name: weight.packed() for name, weight in self._models.weights.items()}
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
        self._models.begin_again(self.best)

    def _state_bytes(self) -> int:
        return sum(
            weight.latent.nbytes + weight.momentum.nbytes + weight.latent.nbytes // 4
            for weight in self._models.weights.values()
        )

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """All that a step depends on."""
        return {
            f"{name}:{part}": array
            for name, weight in self._models.weights.items()
            for part, array in [*weight.state().items(), ("best", self.best[name])]
        }

    def _resume(self, path: Path) -> bool:
        """Takes up what an earlier run kept, if it kept something of these weights."""
        kept = read_state(path)
        if kept is None:
            return False
        progress, arrays = kept
        here = {name: (array.dtype, array.shape) for name, array in self._arrays().items()}
        if here != {name: (array.dtype, array.shape) for name, array in arrays.items()}:
            return False
        for name, weight in self._models.weights.items():
            weight.restore({part: arrays[f"{name}:{part}"] for part in STATE})
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
