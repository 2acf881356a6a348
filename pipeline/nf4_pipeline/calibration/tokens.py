"""The tokens that calibration reads: written by the model itself, or taken from a file.

A model's own text beats documents: it is what the model will see when it is used, it needs no data
set, and none leaks into the weights. Tokens are kept as ids, so a calibration can be repeated
whatever the machine that sampled them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from einops import rearrange, repeat
from numpy.typing import NDArray

from nf4_pipeline.checkpoint.plain_file import read_plain, read_text, why_unreadable
from nf4_pipeline.checkpoint.strict_json import parse_json
from nf4_pipeline.documents import Document, optional
from nf4_pipeline.errors import CheckpointError, PipelineError, RecipeError
from nf4_pipeline.manifest.manifest import KeptModule
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer

LENGTH: Final = 256
"""Tokens of a sequence, at most."""
LARGEST: Final = 256 * 2**20  # bytes of a text, or of tokens that were kept
_TOGETHER: Final = 32  # sequences that are sampled at a time
OPENINGS: Final = Path(__file__).with_name("openings.txt")


@dataclass(frozen=True, kw_only=True)
class TokensDocument(Document):
    """Tokens in a file: as a calibrator keeps them, or in calibration.json of an artifact.

    Attributes:
        key: of what they were made from.
        source: "self" or "text".
        ids: [sequences, length].
        kept: the modules that stay in 16 bit; in calibration.json alone.
    """

    key: str
    source: str
    ids: tuple[tuple[int, ...], ...]
    kept: tuple[KeptModule, ...] | None = optional()


@dataclass(frozen=True)
class CalibrationTokens:
    """What calibration reads.

    Attributes:
        ids: int32 [sequences, length].
        source: "self" or "text".
        key: of what they were made from.
    """

    ids: NDArray[np.int32]
    source: str
    key: str

    @property
    def sha256(self) -> str:
        """Of the ids and their shape."""
        shape = "x".join(str(size) for size in self.ids.shape)
        return hashlib.sha256(shape.encode() + self.ids.astype("<i4").tobytes()).hexdigest()

    def document(self, kept: tuple[KeptModule, ...] | None = None) -> TokensDocument:
        """For a file; `parse_tokens` is the way back from its JSON.

        Args:
            kept: the modules that stay in 16 bit, for calibration.json.
        """
        ids = tuple(tuple(row) for row in self.ids.tolist())
        return TokensDocument(key=self.key, source=self.source, ids=ids, kept=kept)


def parse_tokens(value: Any) -> CalibrationTokens:
    """The way back from JSON.

    Raises:
        RecipeError: the value is not an object with a source, a key, and rows of ids of one length.
    """
    try:
        ids = np.array(value["ids"])
        if ids.dtype.kind != "i" or ids.ndim != 2 or ids.shape[1] < 2:
            raise ValueError("expected rows of whole numbers, of the same length")
        if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
            raise ValueError("an id is out of range")
        return CalibrationTokens(ids.astype(np.int32), str(value["source"]), str(value["key"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RecipeError(f"These are no calibration tokens: {error}.") from error


def read_tokens(path: Path) -> CalibrationTokens | None:
    """What an earlier run kept, or None."""
    try:
        return parse_tokens(json.loads(read_plain(path, LARGEST)))
    except (OSError, ValueError, RecursionError, RecipeError):
        return None


@dataclass(frozen=True)
class Opening:
    """Sequences that begin alike.

    Attributes:
        ids: what they begin with.
        count: how many.
        seed: of the draws.
        any_of: how many tokens of the vocabulary one is drawn from, to follow `ids`; 0 for none.
    """

    ids: tuple[int, ...]
    count: int
    seed: int
    any_of: int = 0

    def rows(self) -> NDArray[np.int64]:
        """The beginnings, [count, ids]; any token at the end of each, if one is drawn."""
        rows = repeat(np.array(self.ids, np.int64), "id -> row id", row=self.count)
        if not self.any_of:
            return rows
        drawn = np.random.default_rng(self.seed).integers(0, self.any_of, (self.count, 1))
        return np.concatenate([rows, drawn], axis=1)


@dataclass(frozen=True)
class Beginnings(Document):
    """What a tokenizer says of how texts begin.

    Attributes:
        eos_token_id: ends one, and so begins the next; None if it knows none.
        bos_token_id: begins one.
        chats: beginnings of conversations, from the chat template.
        tokens: how many it knows; 0 if there is none. A model's vocabulary may be larger.
    """

    eos_token_id: int | None = None
    bos_token_id: int | None = None
    chats: tuple[tuple[int, ...], ...] = ()
    tokens: int = 0

    @classmethod
    def of(cls, tokenizer: LimitedTokenizer) -> Beginnings:
        """Asks a tokenizer; in a child, for it is a stranger's program."""
        chats: list[tuple[int, ...]] = []
        lines = OPENINGS.read_text("utf-8").splitlines() if tokenizer.has_template else []
        for line in lines:
            message = {"role": "user", "content": line}
            try:
                text = tokenizer.in_template([message], answer_follows=True)
                chats.append(tuple(tokenizer.ids(text)))
            except PipelineError:  # a chat template may fail; texts begin without it, too
                break
        ends, begins = map(tokenizer.special_id, ("eos_token_id", "bos_token_id"))
        return cls(ends, begins, tuple(chats), len(tokenizer.tokenizer))


def openings(model: Any, known: Beginnings, sequences: int, length: int) -> list[Opening]:
    """How a model's own texts begin.

    Half begin with any token of the vocabulary, so that they are about whatever the model knows (as
    in LLM-QAT, arXiv:2305.17888); a quarter as a text does, after the end of one; and a quarter as
    a conversation. Without a chat template three quarters begin with any token.

    Args:
        model: its config says which tokens begin and end a text, if the tokenizer does not.
        known: what the tokenizer says; empty if there is none.
        sequences: how many are wanted.
        length: of a sequence; what leaves no room in it is not used.
    """
    config = model.config.get_text_config()
    starts: list[tuple[int, ...]] = []
    for name in ("eos_token_id", "bos_token_id"):
        token = getattr(known, name)
        token = getattr(config, name, None) if token is None else token
        token = token[0] if isinstance(token, list) else token
        if isinstance(token, int) and 0 <= token < config.vocab_size:
            starts.append((token,))
    if not starts:
        rng = np.random.default_rng(0)
        starts = [(int(i),) for i in rng.integers(0, config.vocab_size, 8)]
    chats = [
        chat
        for chat in known.chats
        if chat and len(chat) <= length // 2 and 0 <= min(chat) <= max(chat) < config.vocab_size
    ]
    vocabulary = min(known.tokens or config.vocab_size, config.vocab_size) if length > 2 else 0
    plain = sequences if not vocabulary else -(-sequences // 4)
    talks = sequences // 4 if chats else 0
    counts = [
        *((start, 0, count) for start, count in _shared(starts, plain)),
        *((chat, 0, count) for chat, count in _shared(chats, talks)),
        *((start, vocabulary, n) for start, n in _shared(starts, sequences - plain - talks)),
    ]
    begins: list[Opening] = []
    for ids, any_of, count in counts:
        for first in range(0, count, _TOGETHER):
            size = min(_TOGETHER, count - first)
            begins.append(Opening(ids, size, len(begins), any_of))
    return begins


def _shared(starts: Sequence[tuple[int, ...]], count: int) -> list[tuple[tuple[int, ...], int]]:
    """Shares a number of sequences among different beginnings, those in front first."""
    distinct = list(dict.fromkeys(starts))
    return [
        (start, count // len(distinct) + (i < count % len(distinct)))
        for i, start in enumerate(distinct)
    ]


def sampling_tasks(
    model: Any,
    device: Any,
    begins: Sequence[Opening],
    length: int,
    sampled: dict[int, NDArray[np.int32]],
) -> list[Callable[[], None]]:
    """One function for each opening; it leaves its sequences in `sampled`, by the opening's number.

    Tokens are drawn from the model's own probabilities (temperature 1, nothing cut off), and a text
    that ends is followed by whatever the model thinks comes next.

    Args:
        model: the 16-bit model.
        device: where its inputs go.
        begins: how the sequences begin.
        length: of each.
        sampled: receives int32 [count, length].

    Raises:
        CheckpointError: (a function, when it is called) the probabilities are not finite.
    """
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    # Else generate() would take from it what ends a text, or which tokens may be drawn.
    model.generation_config = GenerationConfig()

    def task(number: int, opening: Opening) -> Callable[[], None]:
        def sample() -> None:
            torch.manual_seed(opening.seed)
            start = torch.from_numpy(opening.rows()).to(device)
            config = GenerationConfig(
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=length - start.shape[1],
                pad_token_id=0,
            )
            ids = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                generation_config=config,
                logits_processor=LogitsProcessorList([_checked]),
            )
            sampled[number] = ids.to("cpu", torch.int32).numpy()

        return sample

    return [task(number, opening) for number, opening in enumerate(begins)]


def _checked(ids: Any, logits: Any) -> Any:
    """The logits as they are, if tokens can be drawn from them."""
    if logits.float().softmax(-1).isnan().any():
        raise CheckpointError(
            "The 16-bit model says NaN, so it cannot write tokens to calibrate on. If a weight "
            "holds an infinity or a NaN, `nf4 quantize` without --calibrate names it; if the model "
            "computes beyond its precision, calibrate on a text: --calibrate FILE."
        )
    return logits


def tokens_of_text(
    path: Path, tokenizer: LimitedTokenizer | None, sequences: int, length: int
) -> NDArray[np.int32]:
    """Sequences from a file, spread evenly over it.

    Args:
        path: a text, or JSONL with "messages", "text" or "prompt" in each line.
        tokenizer: of the model.
        sequences: how many are wanted; fewer if the file is short.
        length: of each.

    Returns:
        int32 [sequences, length].

    Raises:
        RecipeError: the file cannot be read, is no plain file or too large, or holds less than one
            sequence.
        SourceError: the tokenizer fails, or takes more than any real one.
    """
    if tokenizer is None:
        raise RecipeError(
            f"Calibrating on {path.name} needs a tokenizer, and this checkpoint has none. "
            "Let the model write its own tokens: --calibrate self."
        )
    try:
        text = read_text(path, LARGEST)
    except (OSError, UnicodeDecodeError) as error:
        why = why_unreadable(error)
        raise RecipeError(f"The calibration text {path} cannot be read: {why}.") from error
    # Every sequence begins as the tokenizer begins a text: many models are not themselves without.
    prefix = tokenizer.prefix()[: length - 1]
    room = length - len(prefix)
    if path.suffix in (".jsonl", ".ndjson"):
        ids = [
            i
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
            for i in _line(line, tokenizer, f"{path}, line {number}")
        ]
    else:
        ids = tokenizer.ids_all_over(text, sequences, room)
    whole = len(ids) // room
    if whole == 0:
        raise RecipeError(
            f"The calibration text {path} has {len(ids)} tokens; expected at least {room}, better "
            f"{sequences * length:,} (some {round(sequences * length * 4, -4) // 1000:,} KB of "
            "English). Give a longer text, or let the model write one: --calibrate self"
        )
    picked = np.linspace(0, whole - 1, min(sequences, whole)).round().astype(int)
    rows = rearrange(np.array(ids[: whole * room], np.int32), "(row id) -> row id", id=room)[picked]
    prefixes = repeat(np.array(prefix, np.int32), "id -> row id", row=len(rows))
    return np.concatenate([prefixes, rows], axis=1)


def _line(line: str, tokenizer: LimitedTokenizer, where: str) -> list[int]:
    try:
        value = parse_json(line.encode())
        messages = value.get("messages")
        if isinstance(messages, list):
            if not all(isinstance(message, dict) for message in messages):
                raise TypeError("a message that is no object")
            if tokenizer.has_template:
                return tokenizer.ids(tokenizer.in_template(messages, answer_follows=False))
            text = "\n".join(str(message["content"]) for message in messages)
        else:
            text = value["text"] if "text" in value else value["prompt"]
        if not isinstance(text, str):
            raise TypeError(f"a {type(text).__name__} where a text should be")
        end = tokenizer.special_id("eos_token_id")
        return [*tokenizer.ids(text), *([] if end is None else [end])]
    except Exception as error:  # of JSON, of shapes, of a chat template
        raise RecipeError(
            f'{where}: expected an object with "messages", "text" or "prompt" ({error}).'
        ) from error
