"""Which layers lose most by 4 bits, measured one by one, and which to leave in 16 bit for a budget.

Every layer in turn is the only one in 4 bit, rounded to nearest: the model then reads some of the
calibration tokens, and its predictions are held against those of the 16-bit one. Calibrated codes
would not do, since they make up for what others lose. Many of these models pass each block
together, so the weights are read once for all of them, and each layer is rounded when its own model
comes by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from einops import rearrange
from greenlet import getcurrent

from nf4_pipeline.blocks.lockstep import Lockstep
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.calibration.allocation import NOT_FINITE, LayerLoss
from nf4_pipeline.calibration.calibration_pass import weight_in_4bit
from nf4_pipeline.calibration.tokens import CalibrationTokens
from nf4_pipeline.checkpoint.atomic import write_json
from nf4_pipeline.documents import Document
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.fidelity.token_scores import score_tokens
from nf4_pipeline.progress import Reporter
from nf4_pipeline.runtime.determinism import deterministic
from nf4_pipeline.selection import TensorPlan

_TOKENS: Final = 1024
"""Of the calibration tokens: enough to tell layers apart, whose losses differ by orders."""
_TOGETHER: Final = 64  # models that pass the blocks side by side


@dataclass(frozen=True)
class MeasuredLosses(Document):
    """What is known so far, for this budget and any other.

    Attributes:
        key: of what it was measured on.
        kl: by the name of the weight, nats per token.
    """

    key: str
    kl: dict[str, float]


def measure_losses(
    folder: Path,
    weights: Sequence[TensorPlan],
    tokens: CalibrationTokens,
    kept: Path,
    key: str,
    *,
    device: str,
    reporter: Reporter,
) -> list[LayerLoss]:
    """Measures what each layer loses, or goes on doing so.

    Args:
        folder: the 16-bit checkpoint.
        weights: what is quantized.
        tokens: of the calibration.
        kept: the file in which what is known stays.
        key: of all that it follows from; what was measured under another one is not believed.
        device: "cpu" or "cuda:N".
        reporter: told how far it is.
    """
    rows = max(1, _TOKENS // tokens.ids.shape[1])
    # All over them: the first ones begin alike.
    spread = np.linspace(0, len(tokens.ids) - 1, min(rows, len(tokens.ids))).round().astype(int)
    ids = torch.from_numpy(tokens.ids[spread]).long()
    kl = _read(kept, key)
    missing = [plan for plan in weights if plan.name not in kl]
    with (
        deterministic(device),
        StreamedModel(folder, device, rescales=False) as streamed,
        reporter.task("measure each layer", len(weights), unit="layers") as task,
    ):
        task.advance(len(weights) - len(missing))
        for first in range(0, len(missing), _TOGETHER):
            wave = missing[first : first + _TOGETHER]
            _Wave(streamed, wave, ids.to(device), kl, task.advance).run()
            write_json(kept, MeasuredLosses(key, kl).to_json())
    return [
        LayerLoss(
            str(plan.module),
            float(f"{kl[plan.name]:.4g}"),
            plan.source.header.nbytes - sum(part.nbytes for part in plan.stored),
        )
        for plan in weights
    ]


def _read(path: Path, key: str) -> dict[str, float]:
    try:
        known = MeasuredLosses.from_json(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(known.kl) if known.key == key else {}


class _Wave:
    """Some models, each with one layer in 4 bit, and the 16-bit one beside them."""

    def __init__(
        self,
        streamed: StreamedModel,
        weights: Sequence[TensorPlan],
        ids: torch.Tensor,
        kl: dict[str, float],
        done: Callable[[int], None],
    ) -> None:
        self._streamed = streamed
        self._weights = weights
        self._ids = ids
        self._kl = kl
        self._done = done
        self._layer_of: dict[Any, str] = {}  # the weight that is in 4 bit for a run
        self._expected: torch.Tensor

    def run(self) -> None:
        """Measures them all; the 16-bit model is the first to end."""
        tasks = [self._reference, *(self._task(plan) for plan in self._weights)]
        with ExitStack() as stack:
            for plan in self._weights:
                self._hook(plan, stack)
            Lockstep([self._streamed.blocks], self._streamed.open_ahead, self._streamed.close).run(
                tasks
            )

    def _logits(self) -> torch.Tensor:
        logits = self._streamed.model(self._ids, use_cache=False).logits[:, :-1]
        flat: torch.Tensor = rearrange(logits, "sequence token id -> (sequence token) id")
        return flat

    def _reference(self) -> None:
        self._expected = self._logits()
        if not self._expected.isfinite().all():
            raise CheckpointError(
                "The 16-bit model's predictions on its calibration tokens are not finite, so what "
                "its layers lose cannot be measured. Look for a corrected checkpoint, or leave "
                "--extra-bytes out."
            )

    def _task(self, plan: TensorPlan) -> Callable[[], None]:
        def run() -> None:
            self._layer_of[getcurrent()] = plan.name
            own = self._logits()  # when it comes back, the 16-bit model has ended
            scores = score_tokens(self._expected, own, self._ids[:, 1:].flatten())
            # What is not finite in 4 bit is the first to be kept in 16.
            kl = float(scores.kl.mean())
            self._kl[plan.name] = kl if isfinite(kl) else NOT_FINITE
            self._done(1)

        return run

    def _hook(self, plan: TensorPlan, stack: ExitStack) -> None:
        """While its own model passes a layer, the weight is the one that 4 bits would give."""
        layer = self._streamed.model.get_submodule(str(plan.module))
        exact: list[torch.nn.Parameter] = []

        def before(module: Any, inputs: Any) -> None:
            if self._layer_of.get(getcurrent()) == plan.name:
                exact.append(module.weight)
                rounded = weight_in_4bit(module, plan.shape, None)
                module.weight = torch.nn.Parameter(rounded, requires_grad=False)

        def after(module: Any, inputs: Any, output: Any) -> None:
            if exact:
                module.weight = exact.pop()

        stack.callback(layer.register_forward_pre_hook(before).remove)
        stack.callback(layer.register_forward_hook(after).remove)
