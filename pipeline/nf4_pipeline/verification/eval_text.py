"""The text on which the two models are compared, cut into sequences of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.checkpoint import plain_file
from nf4_pipeline.documents import Document
from nf4_pipeline.errors import RecipeError
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer

TEXTS: Final = Path(__file__).with_name("texts")
BUILT_IN: Final = "built in"
_LARGEST: Final = 256 * 2**20  # bytes of a text
RANDOM: Final = "random token ids"
LENGTH: Final = 512
"""Tokens in a sequence, at most: enough for a model to use what it has read."""
TOGETHER: Final = 16_384
"""Tokens that pass through a model at once, at most; more pass in several passes."""


def most_passes(tokens: int) -> int:
    """In how many passes a text goes through a model, at most, before a tokenizer has cut it.

    Args:
        tokens: of the text. A tokenizer may put one in front of each sequence besides.
    """
    with_beginnings = -(-tokens * LENGTH // (LENGTH - 1))
    return max(1, -(-with_beginnings // (TOGETHER - LENGTH + 1)))


@dataclass(frozen=True, slots=True)
class Text(Document):
    """What is read, by domain.

    Attributes:
        name: where it is from.
        domains: name of a domain -> text.
        is_public: passages of it may be quoted in what is published.
    """

    name: str
    domains: Mapping[str, str]
    is_public: bool = False

    @property
    def sha256(self) -> str | None:
        """Of all of it; None if there is no text."""
        if not self.domains:
            return None
        joined = "\0".join(f"{name}\0{text}" for name, text in self.domains.items())
        return hashlib.sha256(joined.encode()).hexdigest()


@dataclass(frozen=True)
class TokenSequence:
    """Tokens that a model reads in one go.

    Attributes:
        domain: where they are from.
        ids: int64 [tokens].
    """

    domain: str
    ids: NDArray[np.int64]


def read_text(path: Path | None) -> Text:
    """The user's text, or the one that comes with the package.

    Raises:
        RecipeError: the file cannot be read, is no plain file or too large, is not UTF-8, or holds
            no words.
    """
    if path is None:
        files = sorted(TEXTS.glob("*.txt"))
        domains = {file.stem: file.read_text("utf-8") for file in files}
        return Text(BUILT_IN, domains, is_public=True)
    try:
        text = plain_file.read_text(path, _LARGEST)
    except (OSError, UnicodeDecodeError) as error:
        why = plain_file.why_unreadable(error)
        raise RecipeError(
            f"The text {path} cannot be read: {why} (looked in {path.absolute().parent}). Correct "
            "the path, or leave --eval-text out: a text comes along."
        ) from error
    if not text.strip():
        raise RecipeError(f"The text {path} is empty. Name one with some thousand words.")
    return Text(path.name, {path.stem: text})


def cut(
    text: Text, tokenizer: LimitedTokenizer, tokens: int, context: int | None
) -> tuple[TokenSequence, ...]:
    """Cuts a text into sequences of about equal length, the same number of tokens a domain.

    Args:
        text: what is read.
        tokenizer: of the model.
        tokens: how many are wanted in all; fewer if the text has fewer.
        context: how many the model takes at once.

    Returns:
        Sequences of at least two tokens. Each begins as the tokenizer begins a text.

    Raises:
        ArtifactError: the tokenizer fails, or takes more than any real one.
        RecipeError: the text, in so many tokens, makes no sequence of two tokens in any domain.
    """
    begin = tokenizer.prefix()
    room = max(1, min(LENGTH, context or LENGTH) - len(begin))
    share = tokens // max(1, len(text.domains))
    sequences: list[TokenSequence] = []
    for domain, words in text.domains.items():
        ids = tokenizer.ids_all_over(words, -(-share // room), room)
        for window in _windows(np.asarray(ids, np.int64), share, room):
            whole = np.concatenate([np.asarray(begin, np.int64), window])
            sequences += [TokenSequence(domain, whole)] if len(whole) > 1 else []
    if not sequences:
        raise RecipeError(
            f"{tokens} tokens of the text {text.name} make no sequence of two tokens in any of its "
            f"{len(text.domains)} domains. Ask for more (--eval-tokens), or name a longer text "
            "(--eval-text)."
        )
    return tuple(sequences)


def _windows(ids: NDArray[np.int64], wanted: int, room: int) -> list[NDArray[np.int64]]:
    """Windows of at most `room` tokens, spread evenly over a text, `wanted` tokens in all."""
    wanted = min(wanted, len(ids))
    count = max(1, -(-wanted // room))
    parts = np.array_split(ids, count)
    size, larger = divmod(wanted, count)
    return [part[: size + (i < larger)] for i, part in enumerate(parts)]


def random_sequences(
    vocabulary: int, tokens: int, context: int | None
) -> tuple[TokenSequence, ...]:
    """Token ids by chance, for a model without a tokenizer; the same ones each time."""
    length = max(2, min(LENGTH, context or LENGTH, tokens))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocabulary, (max(1, tokens // length), length), dtype=np.int64)
    return tuple(TokenSequence(RANDOM, row) for row in ids)
