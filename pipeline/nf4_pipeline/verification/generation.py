"""What a model writes, how fast, and where two answers part."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.documents import Document
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.progress import Task
from nf4_pipeline.runtime.generate import Generator, Sampling
from nf4_pipeline.verification.document import FirstDifference
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
    asked = []
    for prompt in prompts:
        asked.append(Question(prompt, None))
        if prompt.expect is None:
            asked.append(Question(prompt, SEED))
    return asked


@dataclass(frozen=True, slots=True)
class TimedAnswer(Document):
    """What a model wrote after a prompt, and how fast.

    Attributes:
        text: without the prompt and without special tokens.
        ids: the tokens that were written.
        seconds: from the prompt to the last token; 0 if no time can be told.
        first_token_seconds: from the prompt to the first token; None if none was written, or no
            time can be told.
    """

    text: str
    ids: tuple[int, ...]
    seconds: float
    first_token_seconds: float | None


def open_generator(model: Any, artifact: Path, device: str) -> Generator:
    """A model with the artifact's tokenizer.

    Args:
        model: of the artifact or of its source.
        artifact: the export folder.
        device: where inputs go, "cpu" or "cuda:N".

    Raises:
        ArtifactError: the tokenizer cannot be loaded within its limits.
    """
    import torch

    return Generator(model, LimitedTokenizer.open(artifact), torch.device(device))


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


def answer(generator: Generator, question: Question, max_new_tokens: int) -> TimedAnswer:
    """Answers one question; with nothing if the prompt leaves no room for an answer."""
    prompt = question.prompt
    if generator.context and length(generator, prompt) >= generator.context:
        return TimedAnswer("", (), 0.0, None)
    clock = _FirstToken()
    start = time.perf_counter()
    written = generator.answer(
        prompt.prompt, question.sampling(max_new_tokens), chat=prompt.chat, streamer=clock
    )[0]
    first_token_seconds = None if clock.at is None else clock.at - start
    return TimedAnswer(written.text, written.ids, written.seconds, first_token_seconds)


def answer_all(
    generator: Generator, asked: Sequence[Question], max_new_tokens: int, task: Task
) -> list[TimedAnswer]:
    """Answers one question after the other.

    Args:
        generator: the model.
        asked: the questions.
        max_new_tokens: of each answer.
        task: advanced by 1 after each answer.
    """
    answers = []
    for question in asked:
        answers.append(answer(generator, question, max_new_tokens))
        task.advance(1)
    return answers


def length(generator: Generator, prompt: Prompt) -> int:
    """Tokens of a prompt."""
    return int(generator.encode(prompt.prompt, chat=prompt.chat).shape[1])


def answer_tasks(
    generator: Generator,
    asked: Sequence[Question],
    max_new_tokens: int,
    answers: dict[int, TimedAnswer],
) -> list[Callable[[], None]]:
    """One function for each question that leaves its answer in `answers`, by its number."""

    def task(number: int, question: Question) -> Callable[[], None]:
        return lambda: answers.update({number: answer(generator, question, max_new_tokens)})

    return [task(number, question) for number, question in enumerate(asked)]


def find_first_difference(before: TimedAnswer, after: TimedAnswer) -> FirstDifference | None:
    """Where two answers part; None if they are the same text."""
    if before.text == after.text:
        return None
    return FirstDifference(
        token=_common(before.ids, after.ids), character=_common(before.text, after.text)
    )


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items at the beginning are the same in both."""
    for number, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return number
    return min(len(one), len(other))
