"""What a model writes, how fast, and where two answers part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.documents import Document
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.progress import Task
from nf4_pipeline.runtime.generate import Generator
from nf4_pipeline.verification.batches import Draws, cut_batches, may_be_padded, write_batch
from nf4_pipeline.verification.document import FirstDifference
from nf4_pipeline.verification.prompts import Prompt

Run = Callable[[list[Callable[[], None]]], object]
"""Runs functions that all run one model."""

SEED: Final = 0
_TEMPERATURE: Final = 0.8
_TOP_K: Final = 40


@dataclass(frozen=True)
class Question:
    """A prompt, and how it is answered: greedily (seed None), or by draws."""

    prompt: Prompt
    seed: int | None


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
        seconds: from the beginning of its batch to its last token; 0 if no time can be told.
        first_token_seconds: from the beginning of its batch to its first token; None if none was
            written, or no time can be told.
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


@dataclass(frozen=True)
class Answered:
    """Everything that a model wrote.

    Attributes:
        answers: in the order of the questions.
        seconds: of all batches; 0 if no time can be told.
        together: questions of the largest batch.
    """

    answers: tuple[TimedAnswer, ...]
    seconds: float = 0.0
    together: int = 0


def answer_all(
    generator: Generator, asked: Sequence[Question], max_new_tokens: int, task: Task
) -> Answered:
    """Answers questions, many at a time.

    Args:
        generator: the model.
        asked: the questions.
        max_new_tokens: of each answer.
        task: advanced by the answers of each batch.
    """
    plan = _Plan(generator, asked, max_new_tokens, lambda functions: [f() for f in functions])
    seconds = 0.0
    for batch in plan.batches:
        start = time.perf_counter()
        plan.answer(batch)
        seconds += time.perf_counter() - start
        task.advance(len(batch))
    task.advance(len(asked) - sum(map(len, plan.batches)))
    return Answered(plan.answers(), seconds, max(map(len, plan.batches), default=0))


def answer_streamed(
    generator: Generator,
    asked: Sequence[Question],
    max_new_tokens: int,
    run: Run,
) -> Answered:
    """Answers questions by a model whose blocks pass by.

    Args:
        generator: the model.
        asked: the questions.
        max_new_tokens: of each answer.
        run: runs functions that all wait for each other at every block.
    """
    plan = _Plan(generator, asked, max_new_tokens, run)
    run([partial(plan.answer, batch) for batch in plan.batches])
    # All of them were held at every block, so the time of any one says nothing.
    answers = [replace(one, seconds=0.0, first_token_seconds=None) for one in plan.answers()]
    return Answered(tuple(answers), 0.0, max(map(len, plan.batches), default=0))


class _Plan:
    """Questions, cut into batches, and the answers to them."""

    def __init__(
        self, generator: Generator, asked: Sequence[Question], max_new_tokens: int, run: Run
    ) -> None:
        self._generator = generator
        self._asked = asked
        self._max_new_tokens = max_new_tokens
        self._ids = [encode(generator, question.prompt) for question in asked]
        self._answers: dict[int, TimedAnswer] = {}
        self._padded = False
        run([self._try_padding])
        self.batches = list(self._cut())

    def _try_padding(self) -> None:
        context = self._generator.context or 2**31
        lengths = [len(ids) for ids in self._ids if len(ids) < context]
        self._padded = may_be_padded(self._generator, lengths)

    def _cut(self) -> Iterator[list[int]]:
        """The questions of each batch, by number; one without room for an answer is in none."""
        context = self._generator.context
        numbers = [
            number for number, ids in enumerate(self._ids) if context is None or len(ids) < context
        ]
        if numbers:
            lengths = [len(self._ids[number]) for number in numbers]
            for batch in cut_batches(
                self._generator, lengths, self._max_new_tokens, padded=self._padded
            ):
                yield [numbers[place] for place in batch]

    def answer(self, batch: Sequence[int]) -> None:
        """Answers a batch."""
        seeds = tuple(self._asked[number].seed for number in batch)
        written = write_batch(
            self._generator,
            [self._ids[number] for number in batch],
            self._max_new_tokens,
            Draws(_TEMPERATURE, _TOP_K, seeds),
        )
        for number, one in zip(batch, written, strict=True):
            text = self._generator.text(one.ids)
            self._answers[number] = TimedAnswer(text, one.ids, one.seconds, one.first_token_seconds)

    def answers(self) -> tuple[TimedAnswer, ...]:
        """In the order of the questions."""
        nothing = TimedAnswer("", (), 0.0, None)
        return tuple(self._answers.get(number, nothing) for number in range(len(self._asked)))


def encode(generator: Generator, prompt: Prompt) -> list[int]:
    """The tokens of a prompt."""
    ids: list[int] = generator.encode(prompt.prompt, chat=prompt.chat)[0].tolist()
    return ids


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
