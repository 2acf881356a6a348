"""What loading a model and asking it take: time, and memory of the process and of the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from nf4_pipeline.resource_usage import Usage
from nf4_pipeline.verification.document import ModelCosts
from nf4_pipeline.verification.generation import Answered


@dataclass(frozen=True)
class Peaks:
    """The most memory that a piece of work took.

    Attributes:
        memory: bytes of this process.
        device_memory: bytes of the device; 0 on a CPU.
    """

    memory: int
    device_memory: int


def take_peaks(usage: Usage, device: str) -> Peaks:
    """Peaks of a piece of work that just ended.

    Args:
        usage: of the work.
        device: "cpu" or "cuda:N"; its peak is counted from the last call.
    """
    import torch

    device_memory = 0
    if device != "cpu":
        device_memory = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return Peaks(usage.peak_memory, device_memory)


def model_costs(
    answered: Answered,
    load_seconds: float,
    footprint: int,
    peaks: Sequence[Peaks],
    *,
    streamed: bool,
) -> ModelCosts:
    """Sums up what a model took.

    Args:
        answered: what it wrote.
        load_seconds: until it could be asked.
        footprint: bytes of its parameters and buffers.
        peaks: of loading and of answering.
        streamed: its blocks were read for every token.
    """
    answers, seconds = answered.answers, answered.seconds
    first = [a.first_token_seconds for a in answers if a.first_token_seconds is not None]
    each = [len(answer.ids) / answer.seconds for answer in answers if answer.seconds]
    tokens = sum(len(answer.ids) for answer in answers)
    return ModelCosts(
        load_seconds=round(load_seconds, 3),
        tokens_per_second=round(tokens / seconds, 2) if seconds else None,
        sequence_tokens_per_second=round(median(each), 2) if each else None,
        answered_together=answered.together or None,
        first_token_seconds=round(median(first), 4) if first else None,
        footprint_bytes=footprint,
        streamed=streamed,
        peak_memory_bytes=max(peak.memory for peak in peaks),
        peak_device_memory_bytes=max(peak.device_memory for peak in peaks),
    )


def limit_device_memory(device: str, limit: int) -> None:
    """Makes a large GPU behave as a smaller one.

    Args:
        device: "cpu" or "cuda:N"; on a CPU nothing happens.
        limit: bytes; 0 for none.
    """
    import torch

    if limit and device != "cpu":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
