"""Texts drawn from a model's own probabilities, many at a time, from beginnings of any length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.runtime.determinism import deterministic_on_gpu

_CLEARED: Final = 32  # tokens after which memory that fits nothing any more is given back


@dataclass(frozen=True)
class Batch:
    """Texts that are drawn together.

    Attributes:
        starts: int64 [texts, longest], what they begin with; -1 where one has ended.
        seed: of the draws.
    """

    starts: NDArray[np.int64]
    seed: int


def batches(begins: Sequence[Sequence[int]], rows: int, first_seed: int = 0) -> list[Batch]:
    """Texts in batches of much the same size, each with a seed of its own.

    Args:
        begins: what each of them begins with.
        rows: in a batch, at most.
        first_seed: of the first batch.
    """
    padded = np.full((len(begins), max(map(len, begins))), -1, np.int64)
    for row, ids in zip(padded, begins, strict=True):
        row[: len(ids)] = ids
    parts = np.array_split(padded, -(-len(padded) // rows))
    return [Batch(part, first_seed + number) for number, part in enumerate(parts)]


def draw(model: Any, device: Any, batch: Batch, length: int, remedy: str) -> NDArray[np.int32]:
    """Draws at temperature 1, nothing cut off; what follows the end of a text is drawn, too.

    Args:
        model: the 16-bit model; its generation config is replaced.
        device: where its inputs go.
        batch: how the texts begin.
        length: of each.
        remedy: what to do if the model's probabilities are not finite, in sentences.

    Returns:
        int32 [texts, length].

    Raises:
        CheckpointError: the probabilities are not finite.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    # Else generate() would take from it what ends a text, or which tokens may be drawn.
    model.generation_config = GenerationConfig()
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        pad_token_id=0,
    )
    starts = torch.from_numpy(batch.starts).to(device)

    def checked(ids: Any, logits: Any) -> Any:
        if ids.is_cuda and ids.shape[1] % _CLEARED == 0:
            torch.cuda.empty_cache()  # of a cache that grows, every earlier size lies about
        if not logits.sum().isfinite() and logits.float().softmax(-1).isnan().any():
            raise CheckpointError(f"The 16-bit model says NaN, so it cannot write tokens. {remedy}")
        return logits

    def forced(ids: Any, logits: Any) -> Any:
        """Texts whose beginning is longer go on with it, so that all can be drawn together."""
        place = ids.shape[1]
        if place >= starts.shape[1]:
            return logits
        certain = torch.full_like(logits, -torch.inf).scatter(
            1, starts[:, place].clamp(min=0)[:, None], 0.0
        )
        return torch.where(starts[:, place, None] >= 0, certain, logits)

    with deterministic_on_gpu(device):
        torch.manual_seed(batch.seed)
        ids = model.generate(
            starts[:, :1],
            attention_mask=torch.ones_like(starts[:, :1]),
            generation_config=config,
            logits_processor=LogitsProcessorList([checked, forced]),
        )
    found: NDArray[np.int32] = ids.to("cpu", torch.int32).numpy()
    return found


def slow_drawing(device: Any, length: int) -> str:
    """What is said where a model comes block by block for each of so many tokens."""
    return (
        f"The model does not fit on {device}: for each of the {length} tokens of a sequence all of "
        "it is read once. A text of yours is faster: --calibrate FILE."
    )
