"""Tokenizers and chat templates that take all they can get, as edits of a good tokenizer's files.

Each edit takes the parsed tokenizer.json and tokenizer_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

Edit = Callable[[dict[str, Any], dict[str, Any]], object]

_LOOP: Final = "{% for a in range(99999) %}{% for b in range(99999) %}"
_END: Final = "{% endfor %}{% endfor %}"

TEMPLATES: Final[dict[str, str]] = {
    "nested ranges": f"{_LOOP}x{_END}",
    "nested ranges that write nothing": f"{_LOOP}{_END}",
    "a string multiplied": "{{ 'x' * 10**10 }}",
    "a list multiplied": "{{ ([1] * 10**10) | length }}",
    "a string multiplied a little": "{{ 'x' * 10**8 }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a power of powers, shown": "{{ (7 ** 3000000) | string | length }}",
    "a shift": "{{ (2 ** 40) * 'abc' }}",
    "a macro that calls itself": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "macros that call each other twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "a recursive loop": "{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}",
    "a doubling": (
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
        "{% endfor %}{{ ns.s | length }}"
    ),
    "a doubling of lists": (
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}"
        "{% endfor %}{{ ns.s | length }}"
    ),
    "a huge join": "{{ range(99999) | join('y' * 10**6) }}",
    "center": "{{ 'x' | center(10**10) }}",
    "a width": "{{ '%*d' | format(10**10, 5) }}",
    "a format": "{{ '{:>9999999999}'.format('x') }}",
    "rjust": "{{ 'x'.rjust(10**10) }}",
    "zfill": "{{ '1'.zfill(10**10) }}",
    "replace": "{{ ('x' * 10**6).replace('x', 'y' * 10**6) | length }}",
    "indent": "{{ ('x\\n' * 10**7) | indent(1000) | length }}",
    "wordwrap": "{{ ('x' * 10**7) | wordwrap(1) | length }}",
    "urlize": "{{ (('www.' + 'a.' * 10**5 + ' ') * 100) | urlize | length }}",
    "striptags": "{{ ('<' * 10**6) | striptags | length }}",
    "batch": "{{ range(99999) | batch(10**10, 'x') | list | length }}",
    "slice": "{{ range(9) | slice(10**10) | list | length }}",
    "a cycler": f"{{% set c = cycler(1, 2) %}}{_LOOP}{{{{ c.next() }}}}{_END}",
    "a lipsum": "{{ lipsum(n=10**7) | length }}",
    "an import": "{% include 'x' %}",
    "an attribute": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "an undefined attribute": "{{ messages[0].nothing.more }}",
    "a wrong sum": "{{ messages + 1 }}",
    "an exception": "{{ raise_exception('roles\\nmust \\x1b[31m alternate') }}",
    "strftime_now with a width": "{{ strftime_now('%999999999d') | length }}",
    "strftime_now, odd": "{{ strftime_now('%') }}{{ strftime_now('\\0') }}{{ strftime_now(5) }}",
    "tojson of itself": "{% set d = {} %}{% set _ = d.update(a=d) %}{{ d | tojson }}",
    "pprint": "{{ (['x'] * 10**6) | pprint | length }}",
    "nested brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested blocks": "{% if 1 %}" * 3000 + "x" + "{% endif %}" * 3000,
    "a sort": "{{ range(99999) | map('string') | list | sort | join | length }}" * 200,
    "no template": "{% for x in %}",
    "half a character": "{{ '\\ud800' }}",
    "a huge literal": "{{ " + "9" * 200_000 + " | length }}",
}
"""Chat templates; each ends in one error, or in a text of bearable length."""


def _replacing(*rules: tuple[str, str]) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "normalizers": [
            {"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in rules
        ],
    }


def _nested(kind: str, field: str, inner: dict[str, Any], depth: int) -> dict[str, Any]:
    for _ in range(depth):
        inner = {"type": kind, field: [inner]}
    return inner


def _split(regex: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": False,
    }


def _set(part: str, value: Any) -> Edit:
    return lambda tokenizer, config: tokenizer.update({part: value})


def _added(count: int, size: int = 1) -> Edit:
    def edit(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
        first = 257
        tokenizer["added_tokens"] += [
            {
                "id": first + number,
                "content": f"<{number}{'z' * size}>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number in range(count)
        ]

    return edit


def _long_tokens(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    letters = [name for name in vocabulary if len(name) == 1]
    for letter in letters:  # whatever comes is such a token
        number = vocabulary.pop(letter)
        vocabulary[letter * 20_000] = number
    tokenizer["model"]["unk_token"] = letters[0] * 20_000


def _template_processor(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    end = "<|endoftext|>"
    piece = {"SpecialToken": {"id": end, "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece] * 50_000 + [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {end: {"id": end, "ids": [256] * 100, "tokens": [end] * 100}},
    }


def _unigram(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    tokenizer["model"] = {"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0]]}


def _truncation(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    tokenizer["padding"] = {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }


_CUBE: Final = "x" * 300

TOKENIZERS: Final[dict[str, Edit]] = {
    "six replacements": _set("normalizer", _replacing(*[("e", "e" * 40)] * 6)),
    "three replacements of everything": _set(
        "normalizer",
        {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": _CUBE}] * 4,
        },
    ),
    "an empty pattern": _set(
        "normalizer", {"type": "Replace", "pattern": {"Regex": ""}, "content": "ab"}
    ),
    "prepends": _set(
        "normalizer",
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "y" * 10**5}] * 40},
    ),
    "one long prepend": _set("normalizer", {"type": "Prepend", "prepend": "y" * 10**6}),
    "a pattern that goes back": _set("pre_tokenizer", _split(r"(\w+\w+)+\d+$")),
    "another pattern that goes back": _set("pre_tokenizer", _split(r"^((a|e|.)*)*Z")),
    "nested repeats": _set("pre_tokenizer", _split(r"((((.{1,100}){1,100}){1,100}){1,100})Z")),
    "a lookbehind": _set("pre_tokenizer", _split(r"(?<=(a|e)+)x")),
    "a pattern in a normalizer": _set(
        "normalizer", {"type": "Replace", "pattern": {"Regex": r"(.*.*)*Q"}, "content": ""}
    ),
    "a huge repeat": _set("pre_tokenizer", _split(r"a{99999}{99999}")),
    "a pattern that is none": _set("pre_tokenizer", _split(r"(((")),
    "many groups": _set("pre_tokenizer", _split("(" * 20_000 + "a" + ")" * 20_000)),
    "normalizers in normalizers": _set(
        "normalizer", _nested("Sequence", "normalizers", {"type": "NFC"}, 60)
    ),
    "normalizers in normalizers, deep": _set(
        "normalizer", _nested("Sequence", "normalizers", {"type": "NFC"}, 120)
    ),
    "twenty thousand added tokens": _added(20_000),
    "long added tokens": _added(50, 10**5),
    "long tokens": _long_tokens,
    "a processor that repeats": _template_processor,
    "an unknown id out of range": _unigram,
    "padding": _truncation,
    "no model": lambda tokenizer, config: tokenizer.pop("model"),
    "a vocabulary with ids of others": lambda tokenizer, config: tokenizer["model"].update(
        vocab={name: 2**31 for name in tokenizer["model"]["vocab"]}
    ),
    "a list for a class": lambda tokenizer, config: config.update(tokenizer_class=["x"]),
    "another class": lambda tokenizer, config: config.update(tokenizer_class="CanineTokenizer"),
    "a length": lambda tokenizer, config: config.update(model_max_length="x", truncation=True),
    "special tokens that are lists": lambda tokenizer, config: config.update(eos_token=["a"] * 9),
    "special tokens that are objects": lambda tokenizer, config: config.update(
        eos_token={"__type": "AddedToken", "content": "x" * 10**6}
    ),
}
"""Tokenizers; each ends in one error, or makes tokens of bearable number."""

DECODERS: Final[dict[str, Edit]] = {
    "replacements": _set(
        "decoder",
        {
            "type": "Sequence",
            "decoders": [
                {"type": "Fuse"},
                *[{"type": "Replace", "pattern": {"Regex": "."}, "content": "e" * 60}] * 6,
            ],
        },
    ),
    "a pattern that goes back": _set(
        "decoder",
        {
            "type": "Sequence",
            "decoders": [
                {"type": "Fuse"},
                {"type": "Replace", "pattern": {"Regex": r"(.*.*.*)*\d\d"}, "content": ""},
            ],
        },
    ),
    "strip": _set("decoder", {"type": "Strip", "content": "e", "start": 10**9, "stop": 10**9}),
    "one replacement": _set(
        "decoder", {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10**6}
    ),
    "none": _set("decoder", None),
}
"""Decoders; each ends in one error, or in a text of bearable length."""


def write_hostile(folder: Path, edit: Edit) -> None:
    """Changes the files of the tokenizer in a folder."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    edit(tokenizer, config)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def write_template(folder: Path, template: str) -> None:
    """Gives the tokenizer in a folder a chat template."""
    write_hostile(folder, lambda _, config: config.update(chat_template=template))
