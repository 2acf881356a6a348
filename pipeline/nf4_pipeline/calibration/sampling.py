"""Tokens for calibration: the 16-bit model writes them, block by block if it does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.blocks.lockstep import Lockstep
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.calibration.beginnings import MIX, Mix, begin_texts
from nf4_pipeline.calibration.drawing import Batch, batches, draw, slow_drawing
from nf4_pipeline.calibration.tokens import LENGTH, CalibrationTokens
from nf4_pipeline.calibration.tokens_request import TokensRequest, ask_tokenizer
from nf4_pipeline.model.fast_attention import use_fast_attention
from nf4_pipeline.progress import Reporter, Task
from nf4_pipeline.runtime.threads import one_thread_if_small

_SPARE: Final = 2 * 2**30
"""Bytes of memory that the model leaves for what it computes with."""
_TOGETHER: Final = 32  # sequences that are sampled at a time
_REMEDY: Final = (
    "If a weight holds an infinity or a NaN, `nf4 quantize` without --calibrate names it; if the "
    "model computes beyond its precision, calibrate on a text: --calibrate FILE."
)


def make_tokens(
    source: Path,
    text: Path | None,
    count: int,
    key: str,
    device: str,
    reporter: Reporter,
    mix: Mix = MIX,
) -> CalibrationTokens:
    """Samples tokens from the model, or takes them from a text.

    Args:
        source: the 16-bit checkpoint.
        text: None to let the model write.
        count: how many tokens, at most.
        key: of what they are made from.
        device: where the model runs.
        reporter: told how far it is.
        mix: how texts begin that the model writes; others are for studies.

    Raises:
        RecipeError: the text cannot be read, holds less than one sequence, or there is no
            tokenizer for it.
        CheckpointError: the model's probabilities are not finite.
        SourceError: the tokenizer fails, or takes more than any real one.
    """
    with ExitStack() as stack:
        with reporter.task("open the 16-bit model", None):
            streamed = stack.enter_context(StreamedModel(source, device))
            if streamed.device.type == "cuda":
                use_fast_attention(streamed.model)
        config = streamed.model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        length = min(LENGTH, context) if isinstance(context, int) and context > 1 else LENGTH
        sequences = max(1, count // length)
        with reporter.task("ask the tokenizer", None):
            found = ask_tokenizer(TokensRequest(source, text, sequences, length))
        if text is not None:
            return CalibrationTokens(np.array(found.rows, np.int32), "text", key)
        with (
            one_thread_if_small(streamed.footprint),
            reporter.task("sample calibration tokens", sequences, unit="sequences") as task,
        ):
            begins = begin_texts(streamed.model, found.beginnings, sequences, length, mix)
            ids = _sample(streamed, batches(begins, _TOGETHER), length, reporter, task)
        return CalibrationTokens(ids, "self", key)


def _cache_bytes(model: Any) -> int:
    """What one token takes in a model's cache of keys and values, at most."""
    config = model.config.get_text_config()
    width = int(getattr(config, "hidden_size", 0) or 0)
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(shared, int) and heads > 0:
        width = shared * (getattr(config, "head_dim", None) or width // heads)
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    return 2 * layers * width * int(next(model.parameters()).element_size())


def _sample(
    streamed: StreamedModel,
    parts: Sequence[Batch],
    length: int,
    reporter: Reporter,
    task: Task,
) -> NDArray[np.int32]:
    """The sequences that begin so, int32 [sequences, length]."""
    sizes = [len(batch.starts) for batch in parts]
    each = length * _cache_bytes(streamed.model)
    whole = streamed.hold_what_fits(_SPARE + max(sizes) * each, _SPARE + sum(sizes) * each)
    sampled: dict[int, NDArray[np.int32]] = {}
    opened = partial(streamed.open_ahead, again=True)

    def sample(batch: Batch) -> None:
        sampled[batch.seed] = draw(streamed.model, streamed.device, batch, length, _REMEDY)

    runs = [partial(sample, batch) for batch in parts]
    if whole:
        # One after the other: each is done, and known to be, before the next one begins.
        for run, size in zip(runs, sizes, strict=True):
            Lockstep([], opened, streamed.close).run([run])
            task.advance(size)
    else:
        reporter.note(slow_drawing(streamed.device, length))
        Lockstep([streamed.blocks], opened, streamed.close).run(runs)
        task.advance(sum(sizes))
    return np.concatenate([sampled[batch.seed] for batch in parts])
