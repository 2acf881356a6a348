"""Run by a fresh process: the 4-bit artifact is loaded, counted, compared and asked.

It is loaded as anybody loads it, from what is on disk alone; held against its source on a text,
block by block, with round to nearest beside it if that is wanted; and answers the same prompts as
the 16-bit model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nf4_pipeline.fidelity.metrics import by_domain, by_position, compare, difference, histogram
from nf4_pipeline.fidelity.token_scores import TokenScores
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.progress import Reporter
from nf4_pipeline.readers.logits import write_logits
from nf4_pipeline.resource_usage import measured
from nf4_pipeline.runtime.generate import context_of
from nf4_pipeline.runtime.loader import load_with_report
from nf4_pipeline.runtime.threads import one_thread_if_small
from nf4_pipeline.verification.costs import limit_device_memory, model_costs, take_peaks
from nf4_pipeline.verification.document import (
    ComparedText,
    ComparisonCosts,
    Device,
    MeasuredBaseline,
)
from nf4_pipeline.verification.eval_text import TokenSequence, cut, random_sequences
from nf4_pipeline.verification.generation import (
    Answered,
    answer_all,
    open_generator,
    questions,
)
from nf4_pipeline.verification.messages import (
    ArtifactReply,
    ArtifactRequest,
    Baselines,
    LoadedModel,
)
from nf4_pipeline.verification.shares import Share, share_of

if TYPE_CHECKING:
    from nf4_pipeline.blocks.streamed_model import StreamedModel
    from nf4_pipeline.verification.compare_models import Comparison

# The libraries underneath are imported in `prepare`, or where they are used.


def prepare() -> None:
    """Imports what loading, comparing and answering need."""
    import_module("transformers.models.auto.modeling_auto")
    import_module("transformers.quantizers.auto")
    import_module("nf4_pipeline.verification.compare_models")


def run(request: ArtifactRequest, reporter: Reporter) -> ArtifactReply:
    """What came back from disk, its distance from the source, its answers.

    Args:
        request: what to load, to compare and to ask. The scores of all tokens are left in a file.
        reporter: told how many tokens are compared and how many questions answered.

    Raises:
        ArtifactError: the artifact cannot be loaded.
        SourceError: its source cannot be loaded.
        RecipeError: the text is too short for one sequence.
    """
    limit_device_memory(request.device, request.device_memory)
    with measured() as loading:
        start = time.perf_counter()
        with reporter.task("load the 4-bit model", None):
            model, report = load_with_report(request.artifact, device=request.device)
        load_seconds = time.perf_counter() - start
        memory = _count(model)
        footprint = int(model.get_memory_footprint())
    on_load = take_peaks(loading, request.device)
    with measured() as comparing, one_thread_if_small(footprint):
        with reporter.task("cut the text", None):
            tokenizer = LimitedTokenizer.open(request.artifact) if request.text.domains else None
            sequences = _read(request, model, tokenizer)
        shares = [Share.load(path) for path in request.shares]
        comparison, scores = _compare(request, model, sequences, shares, reporter)
        lengths = [len(sequence.ids) - 1 for sequence in sequences]
        domains = [sequence.domain for sequence in sequences]
        with reporter.task("resample the scores", None):
            _save_scores(request.scores, scores, lengths, domains)
            fidelity = compare(scores, lengths)
            score_by_domain = by_domain(scores, lengths, domains)
            nearest, before_learning = (
                None if other is None else _beside(scores, other, lengths, domains)
                for other in (comparison.nearest, comparison.before_learning)
            )
            public = tokenizer if request.text.is_public else None
            worst = comparison.worst.quoted(sequences, public)
    on_comparison = take_peaks(comparing, request.device)
    if request.logits is not None:
        with one_thread_if_small(footprint), reporter.task("write logits", None):
            write_logits(model, request.logits)
    answered = Answered(())
    with measured() as answering, one_thread_if_small(footprint):
        if request.prompts:
            asked = questions(request.prompts)
            with reporter.task("open the tokenizer", None):
                generator = open_generator(model, request.artifact, request.device)
            with reporter.task("answer in 4 bit", len(asked), unit="answers") as task:
                answered = answer_all(generator, asked, request.max_new_tokens, task)
    weights = comparison.weights
    assert weights is not None  # the artifact's folder was given
    peaks = [on_load, take_peaks(answering, request.device)]
    return ArtifactReply(
        device=_describe_device(model),
        missing=tuple(report.missing),
        unexpected=tuple(report.unexpected),
        memory=memory,
        text=ComparedText(
            name=request.text.name,
            sha256=request.text.sha256,
            sequences=len(sequences),
            tokens=len(scores),
            length=max(len(sequence.ids) for sequence in sequences),
        ),
        fidelity=fidelity,
        domains=score_by_domain,
        kl_by_position=by_position(scores, lengths),
        kl_histogram=histogram(scores),
        worst_tokens=worst,
        blocks=comparison.block_errors(),
        outside=comparison.outside_errors(),
        kept=weights.kept,
        changed=(*weights.changed, *weights.missing),
        malformed=tuple(weights.malformed),
        nearest=nearest,
        before_learning=before_learning,
        comparison=ComparisonCosts(
            seconds=round(comparing.seconds + max([0.0, *(s.seconds for s in shares)]), 3),
            peak_memory_bytes=max([on_comparison.memory, *(s.memory for s in shares)]),
            peak_device_memory_bytes=max(
                [on_comparison.device_memory, *(s.device_memory for s in shares)]
            ),
        ),
        answers=answered.answers,
        costs=model_costs(answered, load_seconds, footprint, peaks, streamed=False),
    )


def _count(model: Any) -> LoadedModel:
    """What the loaded model is made of, by kind."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    kept = {id(p): p.numel() for p in model.parameters() if not isinstance(p, Params4bit)}
    buffers = sum(
        buffer.numel()
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    codes = (layer.weight for layer in layers.values() if isinstance(layer.weight, Params4bit))
    return LoadedModel(
        linear4bit=tuple(layers),
        code_bytes=sum(p.numel() * p.element_size() for p in codes),
        kept_weights=sum(kept.values()) + buffers,
    )


def _read(
    request: ArtifactRequest, model: Any, tokenizer: LimitedTokenizer | None
) -> tuple[TokenSequence, ...]:
    """The text as the model reads it; random token ids if there is no text."""
    # A checkpoint need not have a tokenizer to be verified.
    context = context_of(model)
    if tokenizer is not None:
        return cut(request.text, tokenizer, request.tokens, context)
    vocabulary = model.get_input_embeddings().num_embeddings
    return random_sequences(vocabulary, request.tokens, context)


def compare_share(request: ArtifactRequest, number: int, of: int) -> Share | None:
    """Compares both models on a share of the sequences, for whoever brings all of them together.

    Args:
        request: as of `run`; nobody is asked anything, and nothing is left in a file.
        number: of the share, from 0 on.
        of: how many shares there are.

    Returns:
        What came of it; None if no sequence is left for it.

    Raises:
        ArtifactError: the artifact cannot be loaded.
        SourceError: its source cannot be loaded.
        RecipeError: the text is too short for one sequence.
    """
    from nf4_pipeline.blocks.streamed_model import StreamedModel

    with measured() as usage:
        model, _ = load_with_report(request.artifact, device=request.device)
        with one_thread_if_small(int(model.get_memory_footprint())):
            tokenizer = LimitedTokenizer.open(request.artifact) if request.text.domains else None
            sequences = _read(request, model, tokenizer)
            mine = share_of(number, of, len(sequences))
            if not mine:
                return None
            dtype = _dtype(model)
            with StreamedModel(request.source, request.device, dtype, request.served) as streamed:
                comparison = _comparison(streamed, model, request.baselines)
                own = sequences[mine.start : mine.stop]
                scores = comparison.run(own, lambda count: None, first=mine.start)
    peaks = take_peaks(usage, request.device)
    return Share(
        scores=scores,
        beside=comparison.beside,
        worst=comparison.worst.places,
        blocks=comparison.sums(),
        seconds=usage.seconds,
        memory=peaks.memory,
        device_memory=peaks.device_memory,
    )


def _compare(
    request: ArtifactRequest,
    model: Any,
    sequences: Sequence[TokenSequence],
    shares: Sequence[Share],
    reporter: Reporter,
) -> tuple[Comparison, TokenScores]:
    """Runs both models over the sequences, in what the 4-bit one computes in.

    Where others did that, what they found is taken, and the weights alone are looked at.
    """
    from nf4_pipeline.blocks.streamed_model import StreamedModel
    from nf4_pipeline.verification.compare_models import Comparison

    total = sum(len(sequence.ids) for sequence in sequences)
    with (
        reporter.task("compare block by block", total, unit="tokens") as task,
        StreamedModel(request.source, request.device, _dtype(model), request.served) as streamed,
    ):
        if shares:
            comparison = Comparison(streamed, model, request.artifact)
            return comparison, comparison.take(shares)
        comparison = _comparison(streamed, model, request.baselines, request.artifact)
        return comparison, comparison.run(sequences, task.advance)


def _comparison(
    streamed: StreamedModel, model: Any, baselines: Baselines, artifact: Path | None = None
) -> Comparison:
    from nf4_pipeline.verification.compare_models import Comparison

    return Comparison(
        streamed,
        model,
        artifact,
        nearest=baselines.nearest,
        before_learning=baselines.before_learning,
    )


def _save_scores(
    path: Path, scores: TokenScores, lengths: Sequence[int], domains: Sequence[str]
) -> None:
    arrays = {name: getattr(scores, name) for name in TokenScores.__dataclass_fields__}
    np.savez(path, lengths=lengths, domains=domains, **arrays)


def _beside(
    scores: TokenScores, other: TokenScores, lengths: Sequence[int], domains: Sequence[str]
) -> MeasuredBaseline:
    return MeasuredBaseline(
        fidelity=compare(other, lengths),
        domains=by_domain(other, lengths, domains),
        difference=difference(scores, other, lengths, domains),
    )


def _describe_device(model: Any) -> Device:
    import torch

    device, dtype = model.device, str(_dtype(model)).removeprefix("torch.")
    if device.type == "cuda":
        return Device(kind="cuda", name=torch.cuda.get_device_name(device), dtype=dtype)
    return Device(kind="cpu", name=_processor(), dtype=dtype)


def _processor() -> str:
    """The name of the processor, and how many cores of it this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {len(os.sched_getaffinity(0))} cores"


def _dtype(model: Any) -> Any:
    return model.get_input_embeddings().weight.dtype
