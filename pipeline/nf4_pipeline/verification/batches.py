"""Prompts answered many at a time: what stands in one batch, and how its tokens are drawn.

A batch is padded on its left. Where that changes what a model says (it has no mask, or counts
positions from the padding), only prompts of one length go through it together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from nf4_pipeline.runtime.determinism import deterministic_on_gpu
from nf4_pipeline.runtime.generate import Generator

_MOST: Final = 32  # sequences of one batch
_CACHE_BYTES: Final = 2**30
"""Of keys and values of one batch, at most; of both models there may be one at a time."""

_SAME: Final = 0.05
"""How far padding may move the logits of the next token, as sqrt(sum d^2 / sum l^2): rounding in
16 bit moves them by a hundredth."""


@dataclass(frozen=True)
class Draws:
    """How the tokens of a batch are drawn.

    Attributes:
        temperature: logits are divided by it.
        top_k: only the k likeliest tokens are drawn from.
        seeds: one for each sequence, so that its draws depend neither on the others nor on the
            device; None for a sequence whose tokens are the likeliest.
    """

    temperature: float
    top_k: int
    seeds: tuple[int | None, ...]


@dataclass(frozen=True)
class Written:
    """What a model wrote after one of the prompts of a batch.

    Attributes:
        ids: the tokens, the one that ended them included.
        seconds: from the beginning of the batch to the last of them; 0 if there is none.
        first_token_seconds: from the beginning of the batch to the first of them.
    """

    ids: tuple[int, ...]
    seconds: float
    first_token_seconds: float | None


def cut_batches(
    generator: Generator, lengths: Sequence[int], max_new_tokens: int, *, padded: bool
) -> Iterator[list[int]]:
    """Which prompts are answered together, as their numbers.

    Args:
        generator: the model.
        lengths: of the prompts, in tokens; each leaves room for a token.
        max_new_tokens: of each answer.
        padded: prompts of different lengths may stand in one batch (see `may_be_padded`).
    """
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    batch: list[int] = []
    for number in order:
        size = _fitting(generator, lengths[number] + max_new_tokens)
        of_one_length = not batch or lengths[batch[0]] == lengths[number]
        cramped = not _has_room(generator, lengths[number], max_new_tokens)
        if batch and (len(batch) >= size or not (of_one_length or (padded and not cramped))):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def write_batch(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    draws: Draws,
) -> list[Written]:
    """Answers prompts together.

    Args:
        generator: the model.
        prompts: the tokens of each.
        max_new_tokens: of each answer; the context may end them earlier.
        draws: how tokens are chosen.
    """
    ids, mask = _padded(generator, prompts)
    room = (generator.context or 2**31) - ids.shape[1]
    clock = _Clock()
    options: dict[str, Any] = {"max_new_tokens": min(max_new_tokens, room), "do_sample": False}
    if any(seed is not None for seed in draws.seeds):
        from transformers import LogitsProcessorList

        options["logits_processor"] = LogitsProcessorList([_drawn(draws)])
    clock.start()
    written = generator.write(ids, mask, clock, **options)
    return [
        Written(
            tokens,
            clock.steps[len(tokens) - 1] if tokens else 0.0,
            clock.steps[0] if tokens else None,
        )
        for tokens in written
    ]


def _drawn(draws: Draws) -> Any:
    """A logits processor after which the likeliest token is the drawn one (Gumbel-max trick).

    argmax(l / T + g) with g = -log(-log(u)), u uniform, is a draw from softmax(l / T); see
    arXiv:1411.0030.
    """
    import torch
    from transformers import LogitsProcessor

    generators = {
        row: torch.Generator().manual_seed(seed)
        for row, seed in enumerate(draws.seeds)
        if seed is not None
    }
    rows = list(generators)

    class Drawn(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            top = min(draws.top_k, scores.shape[-1])
            values, tokens = scores[rows].float().topk(top)
            uniform = torch.stack([torch.rand(top, generator=generators[row]) for row in rows])
            noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
            drawn = values / draws.temperature + noise.to(values.device)
            chosen = scores.clone()
            chosen[rows] = torch.full_like(scores[rows], -torch.inf).scatter(
                1, tokens, drawn.to(scores.dtype)
            )
            return chosen

    return Drawn()


class _Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.steps: list[float] = []  # seconds from the start to each step
        self._start = 0.0
        self._prompt_seen = False

    def start(self) -> None:
        self._start = time.perf_counter()

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self.steps.append(time.perf_counter() - self._start)
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is left to do."""


def _padded(generator: Generator, prompts: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Tokens and mask, int64 [prompts, length of the longest] on the device."""
    import torch

    length = max(map(len, prompts))
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    # What stands in the padding is masked; any token that the model knows will do.
    ids = torch.tensor([[ids[0]] * (length - len(ids)) + list(ids) for ids in prompts])
    return ids.to(generator.device), mask.to(generator.device)


def _has_room(generator: Generator, length: int, max_new_tokens: int) -> bool:
    return generator.context is None or length + max_new_tokens <= generator.context


def _fitting(generator: Generator, tokens: int) -> int:
    """How many sequences of so many tokens fit into one batch."""
    config = generator.model.config.get_text_config()
    layers = getattr(config, "num_hidden_layers", None) or 1
    heads = getattr(config, "num_attention_heads", None) or 1
    heads_of_keys = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", heads) // heads)
    nbytes = 2 * 2 * layers * heads_of_keys * width * tokens  # keys and values in 16 bit
    return max(1, min(_MOST, _CACHE_BYTES // max(nbytes, 1)))


def may_be_padded(generator: Generator, lengths: Sequence[int]) -> bool:
    """Whether a prompt has the same next token alone and beside a longer one; runs the model.

    What depends on the tokens before, padding among them, is not tried: such models are not padded.

    Args:
        generator: the model.
        lengths: of the prompts, in tokens.
    """
    if len({*lengths}) < 2:
        return False
    config, model = generator.model.generation_config, generator.model
    penalized = (config.repetition_penalty or 1.0) != 1.0 or bool(config.no_repeat_ngram_size)
    if penalized or getattr(model, "_is_stateful", False):
        return False
    return _moved_by_padding(generator, min(lengths), max(lengths)) <= _SAME


def _moved_by_padding(generator: Generator, shortest: int, longest: int) -> float:
    """How far the logits after a prompt move if it is padded."""
    import torch

    known = generator.model.get_input_embeddings().weight.shape[0]
    tokens = [number % known for number in range(1, shortest + 1)]
    alone = _next_logits(generator, [tokens])[0]
    beside = _next_logits(generator, [tokens, [tokens[0]] * longest])[0]
    distance = ((beside - alone).square().sum() / alone.square().sum().clamp(min=1e-30)).sqrt()
    return float(distance) if torch.isfinite(distance) else 1.0


def _next_logits(generator: Generator, prompts: Sequence[Sequence[int]]) -> Any:
    """Logits of the token after each prompt, float32 [prompts, vocabulary]."""
    import torch

    ids, mask = _padded(generator, prompts)
    with torch.inference_mode(), deterministic_on_gpu(generator.device):
        found = generator.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
    return found.logits[0].float()
