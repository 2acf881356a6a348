"""Mutations of valid documents, and the borders that read them: refused by an error of ours.

The tests run some thousand, `scripts/campaigns/fuzz_borders.py` runs 200,000. Each case follows
from the seed, the border and its number alone, so that one that fails can be run again.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Final

from nf4_pipeline.build_folder.record import RecordKind, read_record
from nf4_pipeline.checkpoint.source import open_checkpoint
from nf4_pipeline.checkpoint.untrusted import check_file
from nf4_pipeline.errors import BuildError, PipelineError
from nf4_pipeline.hub import replies
from nf4_pipeline.hub.limits import LARGEST_FAULT
from nf4_pipeline.hub.replies import Origin, ReplyError
from nf4_pipeline.manifest.read import MANIFEST_FILE, read_manifest
from nf4_pipeline.manifest.small_files import tokenizer_config
from nf4_pipeline.model.check_folder import check_small_files
from nf4_pipeline.model.config import causal_lm_config, check_not_quantized, read_config
from nf4_pipeline.model.config_limits import check_config_limits
from nf4_pipeline.recipe import parse_recipe, read_tables
from nf4_pipeline.records import KINDS
from nf4_pipeline.verification.prompts import read_prompts

LONGEST: Final = 1.0
"""Seconds of the processor that a case may take."""

_HANGS: Final = 20
_HOME: Final = Origin("https", "huggingface.co", 443)
_ROOT: Final = "https://huggingface.co"
_CARD: Final = "nf4_pipeline.checkpoint.source_card"

_VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**64, 10**30, 10**39, 10**400, 0.5, -0.0, 1e308,
    float("inf"), float("nan"), "", "x", "a" * 5000, "\0", "\x1b[31m", "\u202e", "\ud800", "../x",
    "/etc/passwd", "~", "0" * 40, "0" * 64, "https://evil.example/x", "javascript:x", [], {},
    [[]], [None], {"a": {}}, {"": ""}, {"__float__": "x"}, {"__float__": []}, [1, "a", None],
)  # fmt: skip
_TOKENS: Final = (
    *rb'null true false NaN Infinity -Infinity -0 1e9 1e999 0.5 [] {} [[]] "" "\u0000" '.split(),
    *rb'"\ud800" "\ud83d\ude00" "../x" , : [ ] { } // \ \" " --- ... &a *a !!python/o:'.split(),
    *rb"'' ' !!binary ? | > % @ ` << 2001-13-45 0x1F 1_000 ~".split(),
    *(b"\xff", b"\xef\xbb\xbf", b"\x00", b"\t", b" ", b"\r", b"\n", b"\x1b"),
)


@dataclass(frozen=True)
class Border:
    """A place where a stranger's document is read.

    Attributes:
        seeds: valid documents.
        read: reads one; raises `PipelineError` or `ReplyError` to refuse it.
    """

    seeds: list[bytes]
    read: Callable[[bytes], object]


@dataclass
class Outcome:
    """What became of the cases of one border.

    Attributes:
        cases: how many.
        refused: by an error of ours.
        accepted: read.
        slowest: seconds of the processor, of the slowest one.
        slowest_case: its number.
        reasons: how often each kind of refusal came, by its first words.
        failures: number of a case, and what is wrong with it.
    """

    cases: int = 0
    refused: int = 0
    accepted: int = 0
    slowest: float = 0.0
    slowest_case: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)


def borders(folder: Path, build: Path, checkpoint: Path) -> dict[str, Border]:
    """Every border, by name.

    Args:
        folder: an empty one for the documents, best in memory.
        build: a finished build; its manifest and records are where mutations start.
        checkpoint: a small one, whose weights stay as they are.
    """

    def small(name: str) -> Path:
        """A folder with a small config and one more document."""
        home = folder / name
        home.mkdir()
        (home / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
        return home

    def document(
        home: Path, name: str, read: Callable[[Path], object]
    ) -> Callable[[bytes], object]:
        def write_and_read(content: bytes) -> object:
            (home / name).write_bytes(content)
            return read(home / name)

        return write_and_read

    found: dict[str, Border] = {
        f"hub {method} {path}": Border([json.dumps(seed).encode()], _reply_reader(method, path))
        for (method, path), seed in _REPLIES.items()
    }
    found["hub error"] = Border(
        [b'{"error": "no", "errors": [{"message": "why"}]}'],
        lambda body: replies.fault(body[:LARGEST_FAULT], "application/json"),
    )
    found["hub Retry-After"] = Border(
        [b"12", b"0", b"Wed, 21 Oct 2030 07:28:00 GMT"],
        lambda text: replies.number(text.decode("latin-1"), 300),
    )
    found["manifest"] = Border(
        [_short_manifest(build)], document(small("manifest"), MANIFEST_FILE, _read_manifest)
    )

    weights = folder / "config"
    weights.mkdir()
    for path in checkpoint.iterdir():
        (weights / path.name).symlink_to(path)
    (weights / "config.json").unlink()
    opened = open_checkpoint(checkpoint)

    def read_model_config(path: Path) -> object:
        config = read_config(path.parent)
        check_not_quantized(config, opened, path.parent)
        check_config_limits(config, opened)
        return causal_lm_config(config, path.parent)

    found["config"] = Border(
        [(checkpoint / "config.json").read_bytes(), *map(_json, _CONFIGS)],
        document(weights, "config.json", read_model_config),
    )
    for name, seeds, also in (
        ("generation_config.json", [_GENERATION], None),
        ("tokenizer_config.json", _TOKENIZERS, tokenizer_config),
        ("special_tokens_map.json", [{"eos_token": {"content": "<e>", "lstrip": False}}], None),
        ("added_tokens.json", [{"<a>": 5, "<b>": 6}], None),
    ):
        found[name] = Border(
            list(map(_json, seeds)), document(small(name), name, _small_file_reader(also))
        )
    index = json.loads((checkpoint / _INDEX).read_bytes())
    found["index"] = Border(
        [_json({**index, "weight_map": dict(list(index["weight_map"].items())[:4])})],
        document(
            _with_weights(folder / "index", checkpoint), _INDEX, lambda p: open_checkpoint(p.parent)
        ),
    )
    for stage in ("download", "quantize", "serialize"):
        record = (build / "records" / f"{stage}.json").read_bytes()
        read = partial(_believed, kind=KINDS[stage])
        found[f"record of {stage}"] = Border(
            [record], document(small(f"record-{stage}"), "r.json", read)
        )
    found["recipe"] = Border(
        _RECIPES,
        document(small("recipe"), "r.toml", lambda p: parse_recipe(read_tables(p), str(p))),
    )
    found["prompts"] = Border(
        [b'{"prompt": "Hello", "expect": "x", "chat": true}\n{"prompt": "One"}\n'],
        document(small("prompts"), "p.jsonl", read_prompts),
    )
    if find_spec(_CARD) is not None:
        found["card"] = Border(
            _CARDS, document(small("card"), "README.md", import_module(_CARD).read_card)
        )
    return found


def case(border: str, seeds: list[bytes], number: int, seed: int) -> bytes:
    """One mutated document: of its values, then of its bytes, or of one of the two."""
    dice = random.Random(f"{seed} {border} {number}")
    content = dice.choice(seeds)
    if dice.random() < 0.65:
        content = _change_values(content, dice)
    if dice.random() < 0.5:
        changed = bytearray(content)
        for _ in range(dice.randint(1, 5)):
            _change_bytes(changed, dice)
        content = bytes(changed)
    return content


def run(name: str, border: Border, number: int, seed: int, outcome: Outcome) -> None:
    """Has a border read one case, and notes what came of it."""
    content = case(name, border.seeds, number, seed)
    start = time.process_time()
    try:
        with _ended_after(_HANGS):
            border.read(content)
        outcome.accepted += 1
    except (PipelineError, ReplyError) as error:
        outcome.refused += 1
        outcome.reasons[_kind(str(error))] += 1
        if not str(error).strip() or len(str(error)) > 3_000:
            outcome.failures.append((number, f"a message of {len(str(error)):,} characters"))
    except BaseException as error:
        outcome.failures.append((number, f"{type(error).__name__}: {str(error)[:120]}"))
    took = time.process_time() - start
    outcome.cases += 1
    if took > outcome.slowest:
        outcome.slowest, outcome.slowest_case = took, number
    if took > LONGEST:
        outcome.failures.append((number, f"it took {took:.1f} s"))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _reply_reader(method: str, path: str) -> Callable[[bytes], object]:
    return lambda body: replies.read(method, path, body, _HOME, _ROOT)


def _read_manifest(path: Path) -> object:
    """As `nf4 inspect` has it, and what it does with the numbers."""
    manifest = read_manifest(path.parent)
    return f"{manifest.totals.ratio:.1%} {manifest.totals.original_bytes / 1e9:.3f}"


def _believed(path: Path, kind: RecordKind[Any]) -> object:
    """A record that cannot be read counts as none."""
    record = read_record(path, kind)
    if record is None:
        raise BuildError("The record is not believed.")
    return record


def _small_file_reader(also: Callable[[Path], object] | None) -> Callable[[Path], object]:
    def read(path: Path) -> None:
        check_file(path.parent, path.name)
        check_small_files(path.parent)
        if also is not None:
            also(path)

    return read


def _with_weights(home: Path, checkpoint: Path) -> Path:
    home.mkdir()
    for path in checkpoint.iterdir():
        if path.name != _INDEX:
            (home / path.name).symlink_to(path)
    return home


def _short_manifest(build: Path) -> bytes:
    """A build's manifest with a few tensors of each kind: a schema takes its time on each."""
    manifest = json.loads((build / "export" / MANIFEST_FILE).read_bytes())
    for name in ("tensors", "stored_tensors", "files"):
        if isinstance(manifest.get(name), list):
            manifest[name] = manifest[name][:3]
    return _json(manifest)


@contextmanager
def _ended_after(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it was still running after {seconds} s")

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


def _change_values(content: bytes, dice: random.Random) -> bytes:
    """Changes of the parsed document; content that is no JSON stays as it is."""
    try:
        value = json.loads(content)
    except ValueError:
        return content
    for _ in range(dice.randint(1, 3)):
        value = _changed(value, dice)
    text = json.dumps(value)
    if dice.random() < 0.1 and isinstance(value, dict) and value:  # a key twice
        name = dice.choice(list(value))
        text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(_value(dice))}}}"
    return text.encode("utf-8", "surrogatepass")


def _changed(value: Any, dice: random.Random) -> Any:
    """The value with one place in it changed."""
    places = list(_places(value))
    if not places:
        return _value(dice)
    parent, key = dice.choice(places)
    chance = dice.random()
    if chance < 0.55:
        parent[key] = _value(dice)
    elif chance < 0.65:
        parent[key] = _nested(dice)
    elif chance < 0.75:
        other_parent, other = dice.choice(places)
        parent[key] = deepcopy(other_parent[other])
    elif chance < 0.85 and isinstance(parent, dict):
        del parent[key]
    elif isinstance(parent, dict):
        parent[dice.choice(["", "x", "\0", "\ud800", "__class__", "n" * 300, str(key) + " "])] = (
            _value(dice)
        )
    else:
        parent[:] = parent * dice.choice((0, 2, 40))
    return value


def _value(dice: random.Random) -> Any:
    return deepcopy(dice.choice(_VALUES))


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    if depth > 40:
        return
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    else:
        keys = list(range(len(value))) if isinstance(value, list) else []
    for key in keys:
        yield value, key
        yield from _places(value[key], depth + 1)


def _nested(dice: random.Random) -> Any:
    value: Any = _value(dice)
    for _ in range(dice.choice((3, 30, 70, 400))):
        value = [value] if dice.random() < 0.5 else {"a": value}
    return value


def _change_bytes(text: bytearray, dice: random.Random) -> None:
    place = dice.randrange(len(text) + 1)
    end = min(len(text), place + dice.randint(1, 40))
    kind = dice.randrange(8)
    if kind == 0 and text:
        text[place % len(text)] ^= 1 << dice.randrange(8)
    elif kind == 1:
        text[place:place] = dice.choice(_TOKENS)
    elif kind == 2:
        del text[place:end]
    elif kind == 3:
        text[place:place] = text[place:end] * dice.choice((1, 2, 50, 2000))
    elif kind == 4:
        _replace_number(text, dice)
    elif kind == 5:
        other = dice.randrange(len(text) + 1)
        text[place:end] = text[other : other + end - place]
    elif kind == 6:
        text[place:end] = dice.choice(_TOKENS) * dice.choice((1, 1, 1, 3000))
    else:
        opening, closing = dice.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"{", b"}"), (b"- ", b"")))
        depth = dice.choice((50, 1500, 20_000))
        text[place:end] = opening * depth + closing * dice.choice((0, depth))


def _replace_number(text: bytearray, dice: random.Random) -> None:
    digits = [i for i, byte in enumerate(text) if 48 <= byte <= 57]
    if digits:
        start = end = dice.choice(digits)
        while end < len(text) and 48 <= text[end] <= 57:
            end += 1
        longer = b"9" * dice.choice((30, 41, 400, 4000, 5000))
        text[start:end] = dice.choice((b"-1", b"0", b"1e400", b"0.1", longer, b"NaN"))


def _kind(message: str) -> str:
    """The first words of a message, without what is quoted in it."""
    words = [w for w in message.split() if not any(c in w for c in "'\"0123456789\\/")]
    return " ".join(words[:6])


_INDEX: Final = "model.safetensors.index.json"
_COMMIT: Final = "a" * 40
_SHA256: Final = "b" * 64
_FILE: Final = {"type": "file", "path": "a/b.json", "size": 5, "oid": _COMMIT}
_REPLIES: Final[dict[tuple[str, str], Any]] = {
    ("GET", "/api/models/a/b/revision/main"): {"id": "a/b", "sha": _COMMIT, "private": False},
    ("GET", "/api/models/a/b/tree/main"): [
        _FILE,
        {"type": "directory", "path": "a", "oid": _COMMIT, "size": 0},
        _FILE | {"path": "w.safetensors", "lfs": {"oid": _SHA256, "size": 9, "pointerSize": 100}},
    ],
    ("GET", "/api/models/a/b/discussions"): {
        "discussions": [
            {
                "num": 3,
                "title": "t",
                "author": {"name": "n"},
                "status": "open",
                "isPullRequest": True,
            }
        ],
        "start": 0,
        "count": 1,
    },
    ("POST", "/oauth/token"): {"access_token": "t", "token_type": "bearer", "expires_in": 3600},
    ("POST", "/api/models/a/b/preupload/main"): {
        "files": [
            {"path": "a", "uploadMode": "lfs", "shouldIgnore": False, "oid": _SHA256},
            {"path": "b", "uploadMode": "regular", "shouldIgnore": False},
        ]
    },
    ("POST", "/api/models/a/b/commit/main"): {
        "commitOid": _COMMIT,
        "commitUrl": f"{_ROOT}/a/b/commit/{_COMMIT}",
        "pullRequestUrl": f"{_ROOT}/a/b/discussions/7",
    },
    ("POST", "/a/b.git/info/lfs/objects/batch"): {
        "objects": [
            {
                "oid": _SHA256,
                "size": 9,
                "actions": {
                    "upload": {
                        "href": f"{_ROOT}/up",
                        "header": {"chunk_size": "5", "00001": f"{_ROOT}/1", "2": f"{_ROOT}/2"},
                    },
                    "verify": {"href": f"{_ROOT}/verify"},
                },
            },
            {"oid": _SHA256, "size": 9, "error": {"code": 422, "message": "no"}},
        ]
    },
    ("POST", "/api/validate-yaml"): {"errors": [{"message": "e"}], "warnings": []},
    ("POST", "/api/repos/create"): {"url": f"{_ROOT}/a/b", "name": "a/b", "id": "1"},
}
_CONFIGS: Final = (
    {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 257,
        "intermediate_size": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "eos_token_id": [1, 2],
        "torch_dtype": "bfloat16",
    },
    {
        "model_type": "mamba",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
        "auto_map": {"AutoConfig": "x.Y"},
    },
)
_GENERATION: Final = {
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "max_length": 100,
    "suppress_tokens": [5],
    "stop_strings": ["x"],
    "transformers_version": "5.5.0",
}
_TOKENIZERS: Final = [
    {
        "tokenizer_class": "TokenizersBackend",
        "model_max_length": 10**30,
        "added_tokens_decoder": {"0": {"content": "<a>", "special": True}},
        "chat_template": "{{ messages }}",
        "extra_special_tokens": ["<x>"],
    },
    {
        "tokenizer_class": "X",
        "auto_map": {"AutoTokenizer": ["x.Y", None]},
        "fast_tokenizer_files": ["tokenizer.json"],
        "extra_special_tokens": {"a": "<x>"},
    },
]
_RECIPES: Final = [
    b"""[quantize]
skip_modules = ["h.3.mlp"]
calibrate = "self"
extra_bytes = "5%"
[serialize]
max_shard_size = "5GB"
[verify]
max_mean_kl = 0.5
eval_tokens = 4096
""",
    b'[verify]\nprompts = "p.jsonl"\nmin_sure_agreement = 1\n',
]
_CARDS: Final = [
    b"""---
license: apache-2.0
language:
- en
- de
tags:
- a
license_name: x
license_link: https://huggingface.co/x
datasets: [a, b]
model-index:
- name: m
  results: []
---
# Title

Text.
""",
    b"---\nlicense: [mit, other]\nlanguage: no\n...\n",
]
