"""What codes learn from: many more of the model's own tokens than calibration reads.

They begin as those do. They are drawn in batches, each with a seed of its own and kept in a file of
its own, so that a killed run goes on with the next batch. How many sequences are drawn at a time
follows from the model and the kind of device alone, since the draws depend on it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nf4_pipeline.blocks.lockstep import Lockstep
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.calibration.beginnings import Beginnings, begin_texts
from nf4_pipeline.calibration.drawing import Batch, batches, draw, slow_drawing
from nf4_pipeline.calibration.learning_plan import FEWEST_SEQUENCES, LearningPlan
from nf4_pipeline.calibration.tokens_request import TokensRequest, ask_tokenizer
from nf4_pipeline.checkpoint.atomic import make_folder, remove_leftovers, write_bytes
from nf4_pipeline.errors import RecipeError
from nf4_pipeline.progress import Reporter
from nf4_pipeline.runtime.threads import one_thread_if_small

_CACHE: Final = {"cpu": 2**29, "cuda": 2**32}
"""Bytes of keys, values and probabilities of the sequences that are drawn at a time, at least."""
_WITH_MODEL: Final = 3 * 2**32
"""Bytes of a GPU that a small model and its cache fill: a step takes as long for a few rows."""
_SPARE: Final = {"cpu": 2**28, "cuda": 2**31}
"""Bytes that the model leaves besides for what it computes with."""
_MOST: Final = {"cpu": 256, "cuda": 2048}
_PROBABILITIES: Final = 24  # bytes for each word of the vocabulary while one of them is drawn
_CACHES: Final = ("past_key_values", "cache_params", "state")
"""What models call what they keep: keys and values, or a recurrent state."""
_FIRST_SEED: Final = 1_000_000
"""Apart from the seeds of the tokens that calibration reads."""
_REMEDY: Final = "Let codes learn from a text (--calibrate FILE), or leave --effort out."


@dataclass(frozen=True)
class LearningTokens:
    """Sequences that are learned from, and such that are held back.

    Attributes:
        ids: int32 [sequences, length].
        held_back: int32 [sequences, length].
        plan: how they are used; a short text shortens it.
    """

    ids: NDArray[np.int32]
    held_back: NDArray[np.int32]
    plan: LearningPlan

    @property
    def sha256(self) -> str:
        """Of all ids and their shapes."""
        total = hashlib.sha256()
        for ids in (self.ids, self.held_back):
            total.update("x".join(map(str, ids.shape)).encode() + ids.astype("<i4").tobytes())
        return total.hexdigest()


def learning_tokens(
    source: Path,
    text: Path | None,
    teacher: StreamedModel,
    plan: LearningPlan,
    folder: Path,
    reporter: Reporter,
) -> LearningTokens:
    """Draws the tokens, or takes them from a text.

    Args:
        source: the 16-bit checkpoint.
        text: None to let the model write.
        teacher: the 16-bit model; as many of its blocks as fit are held from now on.
        plan: how much is wanted.
        folder: keeps batches that are drawn.
        reporter: told how far it is.

    Raises:
        RecipeError: the text cannot be read, or is too short to learn from.
        CheckpointError: the model's probabilities are not finite.
        SourceError: the tokenizer fails, or takes more than any real one.
    """
    wanted = plan.sequences + plan.held_back
    found = ask_tokenizer(TokensRequest(source, text, wanted, plan.length))
    if text is None:
        rows = _drawn(teacher, found.beginnings, wanted, plan.length, folder, reporter)
    else:
        rows = np.array(found.rows, np.int32)
        if len(rows) < FEWEST_SEQUENCES:
            raise RecipeError(
                f"--effort high: the calibration text {text} has {len(rows)} sequences of "
                f"{plan.length} tokens; expected at least {FEWEST_SEQUENCES}, better "
                f"{wanted:,}, or codes learn this text and nothing else. Give a longer text, let "
                "the model write one (--calibrate self), or leave --effort out."
            )
        plan = plan.of_text(len(rows))
    rows = rows[np.random.default_rng(1).permutation(len(rows))]
    last = plan.held_back + plan.sequences
    return LearningTokens(rows[plan.held_back : last], rows[: plan.held_back], plan)


def _drawn(
    teacher: StreamedModel,
    known: Beginnings,
    wanted: int,
    length: int,
    folder: Path,
    reporter: Reporter,
) -> NDArray[np.int32]:
    """The model's own sequences; batches that are in the folder are not drawn again."""
    make_folder(folder)
    remove_leftovers(folder)
    drawn: list[NDArray[np.int32]] = []
    spare = _SPARE[teacher.device.type] + _cache_bytes(teacher)
    opened = partial(teacher.open_ahead, again=True)
    blocks = [] if teacher.hold_what_fits(spare) else [teacher.blocks]
    lockstep = Lockstep(blocks, opened, teacher.close)  # block by block if they do not fit
    rows = _rows_at_a_time(teacher, length, lockstep)
    if blocks:
        reporter.note(slow_drawing(teacher.device, length))
    with (
        one_thread_if_small(teacher.footprint),
        reporter.task("sample tokens to learn from", wanted, unit="sequences") as task,
    ):
        begins = begin_texts(teacher.model, known, wanted, length)
        for batch in batches(begins, rows, _FIRST_SEED):
            path = folder / f"{batch.seed}.safetensors"
            shape = len(batch.starts), length
            ids = _kept(path, shape)
            if ids is None:
                ids = _draw(teacher, batch, length, lockstep)
                digest = json.dumps({"sha256": hashlib.sha256(ids.tobytes()).hexdigest()})
                write_bytes(path, save({"ids": ids}, {"nf4": digest}))
            drawn.append(ids)
            task.advance(len(ids))
    return np.concatenate(drawn)


def _kept(path: Path, shape: tuple[int, int]) -> NDArray[np.int32] | None:
    """A batch that an earlier run drew, if its file holds what was written."""
    try:
        with safe_open(path, framework="np") as file:
            ids: NDArray[np.int32] = file.get_tensor("ids")
            said = json.loads(file.metadata()["nf4"])["sha256"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    whole = ids.shape == shape and hashlib.sha256(ids.tobytes()).hexdigest() == said
    return ids if whole else None


def _draw(
    teacher: StreamedModel, batch: Batch, length: int, lockstep: Lockstep
) -> NDArray[np.int32]:
    drawn: list[NDArray[np.int32]] = []

    def sample() -> None:
        drawn.append(draw(teacher.model, teacher.device, batch, length, _REMEDY))

    lockstep.run([sample])
    if teacher.device.type == "cuda":
        torch.cuda.empty_cache()
    return drawn[0]


def _rows_at_a_time(teacher: StreamedModel, length: int, lockstep: Lockstep) -> int:
    """How many sequences are drawn together: a power of two, by what one takes in the cache."""
    kind = teacher.device.type
    model: Any = teacher.model
    words = int(model.config.get_text_config().vocab_size)
    sizes: list[int] = []

    def measure(tokens: int) -> None:
        probe = torch.zeros(1, tokens, dtype=torch.long, device=teacher.device)
        found = model(probe, use_cache=True)
        sizes.append(_tensor_bytes([found.get(name) for name in _CACHES]))

    lockstep.run([partial(measure, 1), partial(measure, 2)])
    grows = sizes[1] - sizes[0]  # with each token; a recurrent state does not
    each = sizes[0] + grows * (length - 1) + _PROBABILITIES * words
    rows = max(8, min(_MOST[kind], int(_cache_bytes(teacher) / each)))
    return int(2 ** (rows.bit_length() - 1))


def _tensor_bytes(value: Any, depth: int = 5) -> int:
    """Bytes of all tensors in what a model keeps from token to token."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    elif not isinstance(value, list | tuple):
        value = list(getattr(value, "__dict__", {}).values())
    return sum(_tensor_bytes(part, depth - 1) for part in value) if depth else 0


def _cache_bytes(teacher: StreamedModel) -> int:
    """What the sequences that are drawn together may take, by the model and the kind of GPU."""
    kind = teacher.device.type
    if kind == "cpu":
        return _CACHE[kind]
    half = torch.cuda.get_device_properties(teacher.device).total_memory // 2
    return int(max(_CACHE[kind], min(half, _WITH_MODEL - teacher.footprint)))
