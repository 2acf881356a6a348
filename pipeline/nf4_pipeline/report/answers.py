"""What to show of two answers: their beginning, or the place where they part. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from nf4_pipeline.verification.document import AnswerPair

_CONTEXT: Final = 160  # characters that are shown before a first difference that comes late


@dataclass(frozen=True)
class Excerpt:
    """The part of a text that is shown.

    Attributes:
        before: what both answers have in common.
        marked: from the first difference on; None if there is no difference to mark. "" if this
            answer ends where the other goes on.
        cut_start: text before the excerpt is left out.
        cut_end: text after it is left out.
    """

    before: str
    marked: str | None
    cut_start: bool = False
    cut_end: bool = False

    @property
    def cut(self) -> bool:
        return self.cut_start or self.cut_end


def excerpt(text: str, difference: int | None, shown: int | None) -> Excerpt:
    """Cuts a text to `shown` characters, around its first difference if that comes late.

    Args:
        text: an answer.
        difference: index of the first character that differs; None if none does.
        shown: how much to keep; None for all.
    """
    start, end = 0, len(text)
    if shown is not None:
        if difference is not None and difference > shown - _CONTEXT:
            start = max(0, min(difference, len(text)) - _CONTEXT)
        end = min(len(text), start + shown)
    if difference is None:
        return Excerpt(text[start:end], None, start > 0, end < len(text))
    part = min(max(difference, start), end)
    return Excerpt(text[start:part], text[part:end], start > 0, end < len(text))


@dataclass(frozen=True)
class AnsweredPrompt:
    """One prompt and the runs that answered it (greedy, then by seed)."""

    prompt: str
    expect: str | None
    runs: tuple[AnswerPair, ...]

    @property
    def lost(self) -> bool:
        """4 bits got a run wrong that 16 bits got right."""
        return any(run.right_16bit and not run.right_4bit for run in self.runs)

    @property
    def differs(self) -> bool:
        """A run gave another text."""
        return not all(run.same for run in self.runs)


def by_prompt(answers: Sequence[AnswerPair]) -> list[AnsweredPrompt]:
    """Answers under their prompts, in the order in which a reader wants them.

    Those that 4 bits lost come first, then those that differ, then the rest, each as asked.
    """
    runs: dict[tuple[str, str | None], list[AnswerPair]] = {}
    for answer in answers:
        runs.setdefault((answer.prompt, answer.expect), []).append(answer)
    prompts = [AnsweredPrompt(*key, tuple(pairs)) for key, pairs in runs.items()]
    return sorted(prompts, key=lambda prompt: (not prompt.lost, not prompt.differs))
