"""Mutations of safetensors headers, and a reader that watches what they do to the parser.

The tests run a few thousand, `scripts/campaigns/reliability.py headers` runs 200,000; both with a
seed.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.safetensors_header import read_header
from nf4_pipeline.errors import CheckpointError
from nf4_pipeline.resource_usage import peak_memory

_NUMBERS: Final = (0, 1, -1, 2, 7, 8, 255, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30)
_TEXTS: Final = (
    b'null true false NaN Infinity -0 1e9 1e999 0.5 [] {} [[]] "" "\\u0000" "\\ud800" '
    b'"__metadata__" "BF16" "F4" "../x" "/x" , : [ ] { } \xff \xef\xbb\xbf // \\'
).split()


@dataclass
class Outcome:
    """What became of many headers.

    Attributes:
        count: how many were read.
        accepted: how many were taken for valid.
        messages: how often each kind of refusal came, by its first words.
        crashes: errors that are none of ours, with the file's bytes.
        slowest: seconds of the slowest one.
        peak_memory: of the process, in bytes.
    """

    count: int = 0
    accepted: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    crashes: list[tuple[str, bytes]] = field(default_factory=list)
    slowest: float = 0.0
    peak_memory: int = 0


def seeds() -> list[bytes]:
    """Valid files, small: what the mutations start from."""
    found = []
    for shapes in ([[2, 3]], [[4], [2, 2], []], [[0], [1], [3, 5, 7], [64]] * 3):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for number, shape in enumerate(shapes):
            size = 2
            for length in shape:
                size *= length
            header[f"model.layers.{number}.weight"] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": [end, end + size],
            }
            end += size
        found.append(pack(json.dumps(header, separators=(",", ":")).encode(), bytes(end)))
    return found


def pack(text: bytes, data: bytes) -> bytes:
    """A file of a header and its data."""
    return len(text).to_bytes(8, "little") + text + data


def mutate(file: bytes, dice: random.Random) -> bytes:
    """One to six changes: bytes, tokens, numbers, whole entries, and the length in front."""
    length = int.from_bytes(file[:8], "little")
    text, data = bytearray(file[8 : 8 + length]), file[8 + length :]
    for _ in range(dice.randint(1, 6)):
        _change(text, dice)
    packed = pack(bytes(text), data)
    chance = dice.random()
    if chance < 0.05:  # a length that is not that of the text
        wrong = dice.choice([dice.randrange(2 * len(packed)), *map(abs, _NUMBERS)]) % 2**64
        packed = wrong.to_bytes(8, "little") + packed[8:]
    elif chance < 0.1:
        packed = packed[: dice.randrange(len(packed) + 1)]
    elif chance < 0.15:
        packed += dice.randbytes(dice.randint(1, 64))
    return packed


def _change(text: bytearray, dice: random.Random) -> None:
    place = dice.randrange(len(text) + 1)
    end = min(len(text), place + dice.randint(1, 40))
    kind = dice.randrange(7)
    if kind == 0 and text:
        text[place % len(text)] ^= 1 << dice.randrange(8)
    elif kind == 1:
        text[place:place] = dice.choice(_TEXTS)
    elif kind == 2:
        del text[place:end]
    elif kind == 3:
        text[place:place] = text[place:end] * dice.choice((1, 1, 2, 50))
    elif kind == 4:
        _replace_number(text, dice)
    elif kind == 5:
        other = dice.randrange(len(text) + 1)
        text[place:end] = text[other : other + end - place]
    else:
        text[place:end] = dice.choice(_TEXTS)


def _replace_number(text: bytearray, dice: random.Random) -> None:
    digits = [i for i, byte in enumerate(text) if 48 <= byte <= 57]
    if digits:
        start = end = dice.choice(digits)
        while end < len(text) and 48 <= text[end] <= 57:
            end += 1
        text[start:end] = str(dice.choice(_NUMBERS)).encode()


def feed(file: bytes, path: Path, outcome: Outcome) -> bool:
    """Has the parser read a file; True if it took it for valid."""
    path.write_bytes(file)
    start = time.perf_counter()
    accepted = False
    try:
        read_header(path)
        accepted = True
    except CheckpointError as error:
        outcome.messages[_kind(str(error).removeprefix(str(path)))] += 1
    except BaseException as error:
        outcome.crashes.append((repr(error), file))
    outcome.slowest = max(outcome.slowest, time.perf_counter() - start)
    outcome.count += 1
    outcome.accepted += accepted
    return accepted


def _kind(message: str) -> str:
    """The first words of a message, without what is quoted in it."""
    words = [w for w in message.split() if not any(c in w for c in "'\"0123456789\\")]
    return " ".join(words[:6])


def campaign(count: int, seed: int, path: Path) -> Outcome:
    """Mutates and reads `count` headers; what was accepted is mutated further, in part.

    Args:
        count: how many.
        seed: of the mutations.
        path: a file to write them to, best in memory.
    """
    dice = random.Random(seed)
    corpus = seeds()
    first = len(corpus)
    outcome = Outcome()
    for _ in range(count):
        file = mutate(dice.choice(corpus), dice)
        if feed(file, path, outcome) and dice.random() < 0.05 and len(file) < 4096:
            corpus.append(file)
            if len(corpus) > 200:
                del corpus[dice.randrange(first, len(corpus))]
    outcome.peak_memory = peak_memory()
    return outcome


def large() -> dict[str, bytes]:
    """Headers as large as they may be, made to take much memory or time."""
    room = 16 * 2**20 - 64
    entry = b'"%05d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    many = b"".join(entry % number for number in range(100_000))
    return {
        "lists in a list": b'{"a":[' + b"[]," * (room // 3) + b"0]}",
        "lists up to the limit": b'{"a":[' + b"[]," * 480_000 + b"0]}",
        "numbers": b'{"a":[' + b"1," * (room // 2) + b"0]}",
        "numbers up to the limit": b'{"a":[' + b"123456789012," * 1_200_000 + b"0]}",
        "keys": b"{" + b",".join(b'"%x":0' % i for i in range(1_200_000)) + b"}",
        "keys up to the limit": b"{" + b",".join(b'"%x":0' % i for i in range(499_000)) + b"}",
        "a key, again and again": b"{" + b'"a":0,' * 490_000 + b'"a":0}',
        "one long name": b'{"' + b"n" * room + b'":0}',
        "escapes": b'{"' + b"\\u00e9" * (room // 6) + b'":0}',
        "digits": b'{"a":[' + (b"9" * 4000 + b",") * 4000 + b"0]}",
        "100,000 tensors": b"{" + many[:-1] + b"}",
        "spaces": b"{" + b" " * room + b"}",
        "open lists": b'{"a":' + b"[" * 400_000,
    }
