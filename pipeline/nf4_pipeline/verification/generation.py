"""What a model writes, how fast, and where two answers part."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from nf4_pipeline.runtime.generate import Generator, Sampling
from nf4_pipeline.verification.prompts import Prompt

SEED: Final = 0
_TEMPERATURE: Final = 0.8
_TOP_K: Final = 40


@dataclass(frozen=True)
class Question:
    """A prompt, and how it is answered: greedily (seed None), or by draws."""

    prompt: Prompt
    seed: int | None

    def sampling(self, max_new_tokens: int) -> Sampling:
        if self.seed is None:
            return Sampling(max_new_tokens=max_new_tokens)
        return Sampling(
            max_new_tokens=max_new_tokens, temperature=_TEMPERATURE, top_k=_TOP_K, seed=self.seed
        )


def questions(prompts: Sequence[Prompt]) -> list[Question]:
    """Every prompt greedily; one that has no right answer also by draws with a fixed seed."""
    found = []
    for prompt in prompts:
        found.append(Question(prompt, None))
        if prompt.expect is None:
            found.append(Question(prompt, SEED))
    return found


class _FirstToken:
    """A streamer that notes when the first token after the prompt comes."""

    def __init__(self) -> None:
        self.at: float | None = None
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        if self._prompt_seen and self.at is None:
            self.at = time.perf_counter()
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is left to do."""


def answer(generator: Generator, question: Question, max_new_tokens: int) -> dict[str, Any]:
    """Answers one question.

    Returns:
        "text", "ids" (list of int), "seconds" and "first_token_seconds" (or None).
    """
    prompt = question.prompt
    if generator.context and length(generator, prompt) >= generator.context:
        return {"text": "", "ids": [], "seconds": 0.0, "first_token_seconds": None}
    clock = _FirstToken()
    start = time.perf_counter()
    found = generator.answer(
        prompt.prompt, question.sampling(max_new_tokens), chat=prompt.chat, streamer=clock
    )[0]
    return {
        "text": found.text,
        "ids": list(found.ids),
        "seconds": found.seconds,
        "first_token_seconds": None if clock.at is None else clock.at - start,
    }


def length(generator: Generator, prompt: Prompt) -> int:
    """Tokens of a prompt."""
    return int(generator.encode(prompt.prompt, chat=prompt.chat).shape[1])


def tasks(
    generator: Generator,
    asked: Sequence[Question],
    max_new_tokens: int,
    found: dict[int, dict[str, Any]],
) -> list[Callable[[], None]]:
    """One function for each question that leaves its answer in `found`, by its number."""

    def task(number: int, question: Question) -> Callable[[], None]:
        return lambda: found.update({number: answer(generator, question, max_new_tokens)})

    return [task(number, question) for number, question in enumerate(asked)]


def first_difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int] | None:
    """Where two answers part, in tokens and in characters; None if they are the same text."""
    if before["text"] == after["text"]:
        return None
    return {
        "token": _common(before["ids"], after["ids"]),
        "character": _common(before["text"], after["text"]),
    }


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    for number, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return number
    return min(len(one), len(other))
