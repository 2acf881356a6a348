"""The 16-bit model and that of the codes, both on a device: learning where they fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.checkpoint import checkpoint

from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.calibration.latents import LearnedWeight, Tables, round_in_place
from nf4_pipeline.calibration.learning_loss import (
    Computed,
    Gradients,
    gradient_of_kl,
    sum_of_kl,
)
from nf4_pipeline.calibration.learning_plan import LearningPlan
from nf4_pipeline.gptq.saved_codes import read_codes
from nf4_pipeline.model.linear import weight_out_in
from nf4_pipeline.selection import TensorPlan


class HeldModels:
    """Two models on a device.

    Args:
        teacher: the 16-bit model.
        student: another one of the same checkpoint; it becomes the 4-bit one.
        learned: the weights that learn.
        rounded: weights that are rounded to nearest, and stay so.
        files: name of a weight that learns -> the file with the codes that it begins with.
        plan: how it learns.
    """

    def __init__(
        self,
        teacher: StreamedModel,
        student: StreamedModel,
        learned: Sequence[TensorPlan],
        rounded: Sequence[TensorPlan],
        files: Mapping[str, Path],
        plan: LearningPlan,
    ) -> None:
        self._teacher = teacher
        self._student = student
        self._plan = plan
        self.device = student.device
        for streamed in (teacher, student):
            for block in streamed.blocks:
                streamed.hold(block)
        tables = Tables(self.device)
        student.model.requires_grad_(False)
        self._modules = {w.name: teacher.model.get_submodule(str(w.module)) for w in learned}
        self.weights: dict[str, LearnedWeight] = {}
        for weight in rounded:
            round_in_place(student.model.get_submodule(str(weight.module)))
        for weight in learned:
            module = student.model.get_submodule(str(weight.module))
            packed, scales = read_codes(files[weight.name], weight.name)
            exact = weight_out_in(self._modules[weight.name]).detach()
            self.weights[weight.name] = LearnedWeight(
                module, exact, packed, scales.scales(), tables
            )
        if plan.recompute:
            for module in student.blocks.values():
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)

    def learn(
        self,
        ids: NDArray[np.int32],
        gradients: Gradients,
        step: Callable[[LearnedWeight], None],
    ) -> None:
        """Adds the gradients of the mean loss to momentum, and has each weight take its step.

        Args:
            ids: the sequences of the step.
            gradients: adds them.
            step: called with each weight.
        """

        def compute(part: torch.Tensor) -> Computed:
            expected = self._expected(part)
            own = self._student.model(part, use_cache=False).logits
            return own, gradient_of_kl(own, expected, ids.size), None

        weights = list(self.weights.values())
        gradients.add(weights, self._plan.parts(ids, self.device), compute)
        for weight in weights:
            step(weight)

    def kl(self, ids: NDArray[np.int32], pool: Executor) -> float:
        """Nats per token."""

        def measure(part: torch.Tensor) -> float:
            with torch.no_grad():
                expected = self._expected(part)
                return sum_of_kl(self._student.model(part, use_cache=False).logits, expected)

        return sum(pool.map(measure, self._plan.parts(ids, self.device))) / ids.size

    def begin_again(self, codes: Mapping[str, NDArray[np.uint8]]) -> None:
        """Puts all latents into the bins of codes."""
        for name, weight in self.weights.items():
            weight.begin(weight_out_in(self._modules[name]).detach(), codes[name])

    def _expected(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self._teacher.model(ids, use_cache=False).logits
        return logits
