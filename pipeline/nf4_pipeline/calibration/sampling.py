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
from nf4_pipeline.calibration.tokens import (
    LENGTH,
    CalibrationTokens,
    Opening,
    openings,
    sampling_tasks,
)
from nf4_pipeline.calibration.tokens_request import TokensRequest, ask_tokenizer
from nf4_pipeline.progress import Reporter, Task
from nf4_pipeline.runtime.threads import one_thread_if_small

_SPARE: Final = 2 * 2**30
"""Bytes of memory that the model leaves for what it computes with."""


def make_tokens(
    source: Path, text: Path | None, count: int, key: str, device: str, reporter: Reporter
) -> CalibrationTokens:
    """Samples tokens from the model, or takes them from a text.

    Args:
        source: the 16-bit checkpoint.
        text: None to let the model write.
        count: how many tokens, at most.
        key: of what they are made from.
        device: where the model runs.
        reporter: told how far it is.

    Raises:
        RecipeError: the text cannot be read, holds less than one sequence, or there is no
            tokenizer for it.
        CheckpointError: the model's probabilities are not finite.
        SourceError: the tokenizer fails, or takes more than any real one.
    """
    with ExitStack() as stack:
        with reporter.task("open the 16-bit model", None):
            streamed = stack.enter_context(StreamedModel(source, device))
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
            begins = openings(streamed.model, found.beginnings, sequences, length)
            ids = _sample(streamed, begins, length, reporter, task)
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
    begins: Sequence[Opening],
    length: int,
    reporter: Reporter,
    task: Task,
) -> NDArray[np.int32]:
    """The sequences that begin so, int32 [sequences, length]."""
    sequences = sum(begin.count for begin in begins)
    each = length * _cache_bytes(streamed.model)
    largest = max(begin.count for begin in begins)
    whole = streamed.hold_what_fits(_SPARE + largest * each, _SPARE + sequences * each)
    sampled: dict[int, NDArray[np.int32]] = {}
    opened = partial(streamed.open_ahead, again=True)
    runs = sampling_tasks(streamed.model, streamed.device, begins, length, sampled)
    if whole:
        # One after the other: each is done, and known to be, before the next one begins.
        for run, begin in zip(runs, begins, strict=True):
            Lockstep([], opened, streamed.close).run([run])
            task.advance(begin.count)
    else:
        reporter.note(
            f"The model does not fit on {streamed.device}: for each of the {length} tokens of a "
            "sequence all of it is read once. A text of yours is faster: --calibrate FILE."
        )
        Lockstep([streamed.blocks], opened, streamed.close).run(runs)
        task.advance(sequences)
    return np.concatenate([sampled[number] for number in range(len(begins))])
