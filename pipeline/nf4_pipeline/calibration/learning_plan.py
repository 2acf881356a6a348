"""How long codes learn, on what, and what that takes: by the size of the model and the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from nf4_pipeline.checkpoint.block_names import numbered_block
from nf4_pipeline.errors import ResourceError
from nf4_pipeline.selection import Plan, TensorPlan

FEWEST_SEQUENCES: Final = 64
"""Of a text: from fewer, codes learn that text and nothing else."""
_LARGE: Final = 10**9  # weights beyond which memory and time are what counts
_HELD_BACK: Final = 32  # sequences that are measured and not learned, at most
_HELD_BACK_SHARE: Final = 0.05  # of a text
_PASSES: Final = 4  # through the sequences, at most
_FEWEST_STEPS: Final = 8
_LARGEST_RATE: Final = 1.6e-3
_SPARE: Final = 6 * 2**30
"""Bytes of a GPU for what a pass computes with: activations, and logits of most models."""
_ACTIVATIONS: Final = 2 * 2**30
"""Of these, bytes that are not for logits."""
_LOGITS: Final = 4 * 2 * 4096
"""Bytes for each word of a vocabulary: logits of both models, a gradient, and pieces in float32."""
_TEMPORARIES: Final = 32  # bytes for each weight of the largest layer while it takes a step


@dataclass(frozen=True)
class LearningPlan:
    """What decides how codes learn. With the tokens, all that the result follows from.

    Attributes:
        sequences: that are learned from; those that are held back come on top.
        held_back: sequences that are measured and not learned.
        length: of a sequence, in tokens.
        batch: sequences of a step.
        steps: how many.
        rate: the largest step, as a share of a block's scale.
        together: tokens that pass the model at once.
        recompute: keep the inputs of blocks alone, and compute what is in them again.
    """

    sequences: int
    held_back: int
    length: int
    batch: int
    steps: int
    rate: float
    together: int
    recompute: bool

    def of_text(self, rows: int) -> LearningPlan:
        """For as many sequences as a text has: fewer steps where it is short, and longer ones.

        The rate that does best falls with the square root of the steps (docs/calibration.md).
        """
        held_back = max(1, min(self.held_back, round(rows * _HELD_BACK_SHARE)))
        sequences = min(self.sequences, rows - held_back)
        steps = min(self.steps, max(_FEWEST_STEPS, _PASSES * sequences // self.batch))
        rate = min(self.rate * sqrt(self.steps / steps), _LARGEST_RATE)
        return replace(
            self,
            sequences=sequences,
            held_back=held_back,
            batch=min(self.batch, sequences),
            steps=steps,
            rate=float(f"{rate:.2g}"),
        )

    def parts(self, ids: NDArray[np.int32], device: torch.device) -> list[torch.Tensor]:
        """Sequences in the parts that pass a model at once."""
        rows = max(1, self.together // ids.shape[1])
        return list(torch.split(torch.from_numpy(ids).long().to(device), rows))


def plan_learning(weights: Sequence[TensorPlan], kind: str, context: int | None) -> LearningPlan:
    """The plan for a model.

    Args:
        weights: what learns.
        kind: of device, "cpu" or "cuda".
        context: how many tokens the model reads at most; None if it does not say.
    """
    large = sum(prod(weight.shape) for weight in weights) > _LARGE
    length = min(256 if kind == "cpu" else 512, context or 512)
    if kind == "cpu":
        return LearningPlan(512, _HELD_BACK, length, 16, 128, 8e-4, 4 * length, large)
    if large:
        return LearningPlan(2048, _HELD_BACK, length, 32, 128, _LARGEST_RATE, 4096, recompute=True)
    return LearningPlan(16384, _HELD_BACK, length, 32, 1024, 4.5e-4, 8192, recompute=False)


def memory_of_learning(plan: Plan, learned: Sequence[TensorPlan], kind: str) -> int:
    """Bytes of a device for both models, gradients, latents, and some to spare.

    Args:
        plan: of the checkpoint.
        learned: the weights that learn.
        kind: of device, "cpu" or "cuda".
    """
    size = 4 if kind == "cpu" else 2
    model = sum(prod(tensor.shape) for tensor in plan.tensors) * size
    count = sum(prod(weight.shape) for weight in learned)
    largest = max((prod(weight.shape) for weight in learned), default=0)
    spare = _spare(plan, kind)
    gradients = count * size * (2 if kind == "cpu" else 1)  # two threads of a CPU have their own
    return 2 * model + gradients + 2 * count + _TEMPORARIES * largest + spare


def memory_by_block(plan: Plan, learned: Sequence[TensorPlan], kind: str) -> int:
    """The same where a block of each model is on the device at a time; arguments likewise."""
    size = 4 if kind == "cpu" else 2
    blocks: dict[str, int] = {}
    for tensor in plan.tensors:
        block = numbered_block(tensor.name)
        blocks[block] = blocks.get(block, 0) + prod(tensor.shape)
    outside = blocks.pop("", 0)
    own = max(blocks.values(), default=0)
    largest = max((prod(weight.shape) for weight in learned), default=0)
    spare = _spare(plan, kind)
    # Of the 16-bit model the next block is there, too; of the other, gradients and latents.
    return 2 * outside * size + own * (4 * size + 2) + _TEMPORARIES * largest + spare


def _spare(plan: Plan, kind: str) -> int:
    """Bytes for what a pass computes with."""
    if kind != "cuda":
        return 2**29
    outside = [tensor.shape for tensor in plan.tensors if not numbered_block(tensor.name)]
    words = max((shape[0] for shape in outside if len(shape) == 2), default=0)
    return max(_SPARE, _ACTIVATIONS + _LOGITS * words)


def check_memory_of_learning(needed: int, free: int, device: str) -> None:
    """Refuses to begin what the memory of a device cannot hold.

    Args:
        needed: as `memory_by_block` says.
        free: bytes that the device has.
        device: "cpu" or "cuda:N".

    Raises:
        ResourceError: the device has less memory than is needed.
    """
    if needed > free:
        raise ResourceError(
            f"--effort high: learning the codes of this model needs some {needed / 1e9:,.1f} GB of "
            f"memory on {device}, even a block at a time, and {free / 1e9:,.1f} GB are free. Leave "
            "--effort out, which needs less, or name a --device with more memory."
        )
