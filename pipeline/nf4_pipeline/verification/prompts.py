"""The questions that both models are asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from nf4_pipeline.checkpoint.plain_file import read_text, why_unreadable
from nf4_pipeline.checkpoint.strict_json import parse_json
from nf4_pipeline.documents import Document
from nf4_pipeline.errors import RecipeError
from nf4_pipeline.model.tokenizer_facts import TokenizerFacts

LARGEST: Final = 64 * 2**20
"""Bytes of a file of prompts, at most."""
REFERENCE: Final = Path(__file__).with_name("reference.jsonl")


@dataclass(frozen=True, slots=True)
class Prompt(Document):
    """One question.

    Attributes:
        prompt: the text.
        expect: the one right answer, if there is one.
        chat: put the text into the model's chat template, if it has one.
    """

    prompt: str
    expect: str | None = None
    chat: bool = False


def asked_with(tokenizer: TokenizerFacts | None, prompts: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
    """Prompts as a tokenizer can take them: without its chat template, if that fails."""
    if tokenizer is None or tokenizer.template != "fails":
        return prompts
    return tuple(replace(prompt, chat=False) for prompt in prompts)


_EXPECTED: Final = (
    'expected a JSON object on each line, with a text under "prompt", such as '
    '{"prompt": "Two and two is", "expect": "four"} ("expect" may be left out)'
)


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Reads a JSONL file: one object a line with "prompt", and "expect" or "chat" if wanted.

    Raises:
        RecipeError: the file is missing, unreadable, no plain file, too large or empty, or a line
            is something else; the text names the line.
    """
    try:
        lines = read_text(path, LARGEST).split("\n")  # splitlines() also splits inside of texts
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    prompts = tuple(
        _parse(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )
    if not prompts:
        raise RecipeError(f"The prompts {path} are empty; expected one JSON object a line.")
    return prompts


def unreadable(path: Path, error: OSError | UnicodeDecodeError) -> RecipeError:
    """The error of a file of prompts that cannot be read."""
    return RecipeError(
        f"The prompts {path} cannot be read: {why_unreadable(error)} (looked in "
        f"{path.absolute().parent}). Correct the path, or leave --prompts out: prompts come along."
    )


def _parse(line: str, where: str) -> Prompt:
    try:
        value = parse_json(line.encode())
    except ValueError as error:
        what = "no JSON" if line.lstrip()[:1] == "{" else "plain text, no JSON"
        raise RecipeError(f"{where} is {what}; {_EXPECTED}.") from error
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise RecipeError(f"{where}: {_EXPECTED}.")
    if not value["prompt"].strip():
        raise RecipeError(f"{where}: the prompt is empty.")
    expect, chat = value.get("expect"), value.get("chat", False)
    if not isinstance(expect, str | None) or not isinstance(chat, bool):
        raise RecipeError(f'{where}: "expect" must be a text, "chat" true or false.')
    return Prompt(value["prompt"], expect, chat)
