"""Run by a fresh process: the 16-bit checkpoint answers prompts.

Being a process of its own, it starts from what is on disk alone, and its peak memory is its own.
What does not fit the device is streamed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Final

from nf4_pipeline.progress import LOADING, Reporter, Task
from nf4_pipeline.resource_usage import measured
from nf4_pipeline.runtime.generate import Generator
from nf4_pipeline.runtime.threads import one_thread_if_small
from nf4_pipeline.verification.costs import limit_device_memory, model_costs, take_peaks
from nf4_pipeline.verification.generation import (
    Answered,
    Question,
    answer_all,
    answer_streamed,
    open_generator,
    questions,
)
from nf4_pipeline.verification.messages import SourceReply, SourceRequest

if TYPE_CHECKING:
    from nf4_pipeline.blocks.streamed_model import StreamedModel

_SPARE: Final = 2 * 2**30
"""Bytes of the device's memory that the 16-bit model leaves for what it computes with."""


def prepare() -> None:
    """Imports what loading and answering need."""
    import_module("transformers.models.auto.modeling_auto")
    import_module("nf4_pipeline.blocks.streamed_model")


def run(request: SourceRequest, reporter: Reporter) -> SourceReply:
    """The 16-bit model's answers, and what they cost.

    Args:
        request: what to load and to ask.
        reporter: told how many questions are answered.

    Raises:
        SourceError: the checkpoint cannot be loaded.
    """
    with reporter.task(LOADING, None):
        import_module("nf4_pipeline.blocks.streamed_model")

    limit_device_memory(request.device, request.device_memory)
    answered = Answered(())
    if request.served is not None and not request.prompts:
        return _unasked(request)
    with measured() as usage, ExitStack() as stack:
        start = time.perf_counter()
        with reporter.task("load the 16-bit model", None):
            streamed = stack.enter_context(_open(request))
            whole = streamed.hold_what_fits(_SPARE, limit=request.device_memory)
            load_seconds = time.perf_counter() - start
        footprint = streamed.footprint
        if request.prompts:
            streamed.take_generation_config()
            with one_thread_if_small(footprint):
                answered = _answer(request, streamed, reporter, whole=whole)
    peaks = [take_peaks(usage, request.device)]
    costs = model_costs(answered, load_seconds, footprint, peaks, streamed=not whole)
    return SourceReply(answers=answered.answers, costs=costs)


def _open(request: SourceRequest) -> StreamedModel:
    from nf4_pipeline.blocks.streamed_model import StreamedModel

    return StreamedModel(request.source, request.device, served=request.served)


def _unasked(request: SourceRequest) -> SourceReply:
    """What is known of a model that nobody asks anything: nothing of it is fetched for that."""
    from nf4_pipeline.blocks.streamed_model import footprint_of

    with measured() as usage:
        footprint = footprint_of(request.source, request.device)
    peaks = [take_peaks(usage, request.device)]
    costs = model_costs(Answered(()), 0.0, footprint, peaks, streamed=True)
    return SourceReply(answers=(), costs=costs)


def _answer(
    request: SourceRequest, streamed: StreamedModel, reporter: Reporter, *, whole: bool
) -> Answered:
    """Answers batch by batch if the model is there, else all batches together, block by block."""
    asked = questions(request.prompts)
    with reporter.task("open the tokenizer", None):
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
) -> Answered:
    from nf4_pipeline.blocks.lockstep import Lockstep

    last = list(streamed.blocks)[-1]

    def closed(block: str) -> None:
        streamed.close(block)
        if block == last:
            task.advance(1)

    lockstep = Lockstep([streamed.blocks], partial(streamed.open_ahead, again=True), closed)
    return answer_streamed(generator, asked, max_new_tokens, lockstep.run)
