"""The tokens that calibration reads: written by the model itself, or taken from a file.

A model's own text beats documents: it is what the model will see when it is used, it needs no data
set, and none leaks into the weights. Tokens are kept as ids, so a calibration can be repeated
whatever the machine that sampled them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from einops import rearrange, repeat
from numpy.typing import NDArray

from nf4_pipeline.checkpoint.plain_file import read_plain, read_text, why_unreadable
from nf4_pipeline.checkpoint.strict_json import parse_json
from nf4_pipeline.documents import Document, optional
from nf4_pipeline.errors import RecipeError
from nf4_pipeline.manifest.manifest import KeptModule
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer

LENGTH: Final = 256
"""Tokens of a sequence, at most."""
LARGEST: Final = 256 * 2**20  # bytes of a text, or of tokens that were kept


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
