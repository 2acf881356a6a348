"""How the texts begin that a model writes for its own calibration."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from nf4_pipeline.documents import Document
from nf4_pipeline.errors import PipelineError
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer

OPENINGS: Final = Path(__file__).with_name("openings.txt")
SEEDS: Final = Path(__file__).with_name("seeds.toml")

Ids = tuple[int, ...]


def read_seeds() -> dict[str, list[str]]:
    """What texts of each kind begin with: name of the kind -> beginnings."""
    seeds: dict[str, list[str]] = tomllib.loads(SEEDS.read_text("utf-8"))
    return seeds


@dataclass(frozen=True)
class Beginnings(Document):
    """What a tokenizer says of how texts begin.

    Attributes:
        eos_token_id: ends one, and so begins the next; None if it knows none.
        bos_token_id: begins one.
        chats: beginnings of conversations, from the chat template.
        seeds: beginnings of texts by their kind, those that it knows all characters of.
        tokens: how many it knows; 0 if there is none. A model's vocabulary may be larger.
    """

    eos_token_id: int | None = None
    bos_token_id: int | None = None
    chats: tuple[Ids, ...] = ()
    seeds: Mapping[str, tuple[Ids, ...]] = field(default_factory=dict)
    tokens: int = 0

    @classmethod
    def of(cls, tokenizer: LimitedTokenizer) -> Beginnings:
        """Asks a tokenizer; in a child, for it is a stranger's program."""
        ends, begins = map(tokenizer.special_id, ("eos_token_id", "bos_token_id"))
        seeds = {
            kind: tuple(ids for text in texts if (ids := _seed(tokenizer, text)))
            for kind, texts in read_seeds().items()
        }
        return cls(ends, begins, tuple(_chats(tokenizer)), seeds, tokenizer.size)


def _chats(tokenizer: LimitedTokenizer) -> list[Ids]:
    chats: list[Ids] = []
    lines = OPENINGS.read_text("utf-8").splitlines() if tokenizer.has_template else []
    for line in lines:
        message = {"role": "user", "content": line}
        try:
            text = tokenizer.in_template([message], answer_follows=True)
            chats.append(tuple(tokenizer.ids(text)))
        except PipelineError:  # a chat template may fail; texts begin without it, too
            break
    return chats


def _seed(tokenizer: LimitedTokenizer, text: str) -> Ids:
    """A seed behind what the tokenizer puts before any text; nothing if it cannot write it."""
    try:
        ids = tokenizer.ids(text)
        if tokenizer.special_id("unk_token_id") in ids:
            return ()
        written = "".join(tokenizer.decode(ids).split())
        # Some leave out what they have no token for; others write it in other characters.
        if 2 * len(written) < len("".join(text.split())):
            return ()
        return (*tokenizer.prefix(), *ids)
    except PipelineError:  # some refuse it
        return ()


@dataclass(frozen=True)
class Mix:
    """Shares of texts by how they begin. The rest begins with any token of the vocabulary.

    Attributes:
        plain: as a text does, after the end of one.
        chats: as a conversation; if there is no chat template, with any token.
        seeds: with a seed; if the tokenizer knows none, with any token.
        kinds: of seeds; None for all.
    """

    plain: float = 0.125
    chats: float = 0.125
    seeds: float = 0.75
    kinds: tuple[str, ...] | None = None


MIX: Final = Mix()


def begin_texts(
    model: Any, known: Beginnings, sequences: int, length: int, mix: Mix = MIX
) -> list[Ids]:
    """How a model's own texts begin.

    Seeds lead it to what users do; docs/calibration.md says what each start is worth. Without them
    most texts begin with any token of the vocabulary, to be about whatever the model knows (as in
    LLM-QAT, arXiv:2305.17888).

    Args:
        model: its config says which tokens begin and end a text, if the tokenizer does not.
        known: what the tokenizer says; empty if there is none.
        sequences: how many are wanted.
        length: of a sequence; what leaves less than half of it is not used.
        mix: shares of each kind.

    Returns:
        What each begins with.
    """
    config = model.config.get_text_config()
    words = int(config.vocab_size)
    starts: list[Ids] = []
    for name in ("eos_token_id", "bos_token_id"):
        token = getattr(known, name)
        token = getattr(config, name, None) if token is None else token
        token = token[0] if isinstance(token, list) else token
        if isinstance(token, int) and 0 <= token < words:
            starts.append((token,))
    rng = np.random.default_rng(0)
    starts = list(dict.fromkeys(starts)) or [(int(i),) for i in rng.integers(0, words, 8)]

    def fit(beginnings: Sequence[Ids]) -> list[Ids]:
        return [
            ids
            for ids in beginnings
            if ids and len(ids) <= length // 2 and 0 <= min(ids) <= max(ids) < words
        ]

    chats = fit(known.chats)
    kinds = known.seeds if mix.kinds is None else mix.kinds
    seeds = [seeds for kind in kinds if (seeds := fit(known.seeds.get(kind, ())))]
    talks = int(sequences * mix.chats) if chats else 0
    seeded = int(sequences * mix.seeds) if seeds else 0
    vocabulary = min(known.tokens or words, words) if length > 2 else 0
    rest = sequences - talks - seeded
    plain = min(rest, int(np.ceil(sequences * mix.plain))) if vocabulary else rest
    drawn: list[int] = rng.integers(0, max(1, vocabulary), rest - plain).tolist()
    return [
        *islice(cycle(starts), plain),
        *islice(cycle(chats), talks),
        *((*start, token) for start, token in zip(cycle(starts), drawn, strict=False)),
        *islice(_in_turn(seeds), seeded),
    ]


def _in_turn(kinds: Sequence[Sequence[Ids]]) -> Iterator[Ids]:
    """Seeds without end: one of each kind, the next of each kind."""
    for own in zip(*map(cycle, kinds), strict=False):
        yield from own
