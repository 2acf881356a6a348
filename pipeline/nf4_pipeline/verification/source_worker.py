"""Run by a fresh process: the 16-bit checkpoint answers prompts.

Being a process of its own, it starts from what is on disk alone, and its peak memory is its own.
What does not fit the device is streamed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from nf4_pipeline.progress import Reporter, Task
from nf4_pipeline.resource_usage import measured
from nf4_pipeline.runtime.generate import Generator
from nf4_pipeline.runtime.threads import one_thread_if_small
from nf4_pipeline.verification.costs import limit_device_memory, model_costs, take_peaks
from nf4_pipeline.verification.generation import (
    Question,
    TimedAnswer,
    answer_all,
    answer_tasks,
    open_generator,
    questions,
)
from nf4_pipeline.verification.messages import SourceReply, SourceRequest

if TYPE_CHECKING:
    from nf4_pipeline.blocks.streamed_model import StreamedModel

_SPARE: Final = 2 * 2**30
"""Bytes of the device's memory that the 16-bit model leaves for what it computes with."""


def run(request: SourceRequest, reporter: Reporter) -> SourceReply:
    """The 16-bit model's answers, and what they cost.

    Args:
        request: what to load and to ask.
        reporter: told how many questions are answered.

    Raises:
        SourceError: the checkpoint cannot be loaded.
    """
    from nf4_pipeline.blocks.streamed_model import StreamedModel

    limit_device_memory(request.device, request.device_memory)
    answers: list[TimedAnswer] = []
    with measured() as usage:
        start = time.perf_counter()
        with StreamedModel(request.source, request.device) as streamed:
            whole = streamed.hold_what_fits(_SPARE, limit=request.device_memory)
            load_seconds = time.perf_counter() - start
            footprint = streamed.footprint
            if request.prompts:
                streamed.take_generation_config()
                with one_thread_if_small(footprint):
                    answers = _answer(request, streamed, reporter, whole=whole)
    peaks = [take_peaks(usage, request.device)]
    costs = model_costs(answers, load_seconds, footprint, peaks, streamed=not whole)
    return SourceReply(answers=tuple(answers), costs=costs)


def _answer(
    request: SourceRequest, streamed: StreamedModel, reporter: Reporter, *, whole: bool
) -> list[TimedAnswer]:
    """Answers one after the other if the model is there, else all together, a block at a time."""
    asked = questions(request.prompts)
    generator = open_generator(streamed.model, request.artifact, request.device)
    if whole:
        with reporter.task("answer in 16 bit", len(asked), unit="answers") as task:
            return answer_all(generator, asked, request.max_new_tokens, task)
    tokens = request.max_new_tokens
    with reporter.task("answer in 16 bit, streamed", tokens, unit="tokens") as task:
        return _answer_streamed(generator, asked, tokens, streamed, task)


def _answer_streamed(
    generator: Generator,
    asked: Sequence[Question],
    max_new_tokens: int,
    streamed: StreamedModel,
    task: Task,
) -> list[TimedAnswer]:
    from nf4_pipeline.blocks.lockstep import Lockstep

    last = list(streamed.blocks)[-1]

    def closed(block: str) -> None:
        streamed.close(block)
        if block == last:
            task.advance(1)

    answers: dict[int, TimedAnswer] = {}
    lockstep = Lockstep([streamed.blocks], partial(streamed.open_ahead, again=True), closed)
    lockstep.run(answer_tasks(generator, asked, max_new_tokens, answers))
    # All of them were held at every block, so the time of any one says nothing.
    return [
        replace(answers[number], seconds=0.0, first_token_seconds=None)
        for number in range(len(asked))
    ]
