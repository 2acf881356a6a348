"""Mutated documents of strangers at every border: refused by an error of ours, or read."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Final

import pytest
from nf4_pipeline.checkpoint.named_path import named_path, problem_of
from nf4_pipeline.checkpoint.strict_json import parse_json
from nf4_pipeline.checkpoint.untrusted import check_file

from tests.campaigns.borders import Outcome, borders, case, run
from tests.support.command_line import check_ending, refusal, run_nf4
from tests.support.tiny import copy_of

CASES = 150


def test_no_border_lets_an_error_through(
    exported_falcon: Path, tiny_falcon: Path, tmp_path: Path
) -> None:
    places = borders(tmp_path, exported_falcon, tiny_falcon)
    assert len(places) >= 24
    for name, border in places.items():
        outcome = Outcome()
        for number in range(CASES):
            run(name, border, number, 0, outcome)
        wrong = [failure for failure in outcome.failures if "it took" not in failure[1]]
        assert wrong == [], name
        assert outcome.accepted > CASES // 30, name
        if name not in ("hub error", "hub Retry-After", "card"):  # an answer to anything
            assert outcome.refused > CASES // 4, name
        if not name.startswith("record"):
            assert len(outcome.reasons) > 1 or not outcome.refused, name


def test_a_case_can_be_run_again() -> None:
    seeds = [b'{"a": [1, {"b": "x"}]}']
    first = [case("a border", seeds, number, 5) for number in range(300)]
    assert first == [case("a border", seeds, number, 5) for number in range(300)]
    assert first != [case("a border", seeds, number, 6) for number in range(300)]
    assert len(set(first)) > 200


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        (b'{"a": 1000000000000000019884624838656}', ""),
        (b"9" * 41, "a number in it has 41 digits"),
        (b'{"a": NaN}', "NaN stands in it"),
        (b"[-Infinity]", "-Infinity stands in it"),
        (b"1e999", "larger than any"),
        (b"-1e999", "larger than any"),
        (b"1" + b"0" * 39, ""),
        (b"[" * 1500 + b"]" * 1500, "nested deeper than 64"),
        (b'{"a":' * 100_000, "nested deeper than 64"),
        (b'{"a": 1, "a": 1}', "the key 'a' stands in it twice"),
        (b'"\\ud800"', "half a character"),
        (b"\xff", "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"", "Expecting value"),
    ],
)
def test_numbers_that_json_does_not_have(text: bytes, refused: str) -> None:
    try:
        parse_json(text, finite=True)
        said = ""
    except ValueError as error:
        said = str(error)
    assert refused in said
    assert bool(refused) == bool(said)


GOOD: Final[dict[str, list[object]]] = {
    "eos_token_id": [5, [5], [1, 2], [], -1, None],
    "pad_token_id": [0, -1, None],
    "temperature": [0.7, 1, 0, None],
    "top_k": [50, None],
    "repetition_penalty": [1, 1.0, 1.1, None],
    "do_sample": [True, None],
    "suppress_tokens": [[], [1], None],
    "bad_words_ids": [[[1]], []],
    "stop_strings": ["x", ["x", "y"], None],
    "anything_else": ["x", {"a": 1}, [], None],
}
BAD: Final[dict[str, list[object]]] = {
    "eos_token_id": ["x", ["x"], [[1]], {}, 1.5, True, 2**31, 10**30, -2, [None], "\x1b[31m"],
    "pad_token_id": ["x", [1], {}, 0.5, False, 2**40],
    "bos_token_id": ["x", [1], {}],
    "temperature": ["0.7", [], {}, True],
    "top_k": ["x", 1.5, [], {}, True, 2**31],
    "top_p": ["x", [0.9]],
    "repetition_penalty": ["x", -1, 0, 0.0, 2, [], True],
    "do_sample": ["yes", 1, []],
    "suppress_tokens": ["x", 5, ["a"], {"a": 1}],
    "bad_words_ids": [["x"], [[]], [1]],
    "stop_strings": ["", [], [1], {}, 5, True],
    "max_length": ["x", [], 1e400],
}


def write(folder: Path, content: object) -> str:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return refusal(lambda: check_file(folder, "generation_config.json"))


def test_a_generation_config_that_nothing_can_generate_with(tmp_path: Path) -> None:
    for name, values in BAD.items():
        for value in values:
            message = write(tmp_path, {name: value})
            assert "generation_config.json" in message, (name, value)
            assert name in message or "stands in it" in message
            assert len(message) < 300 + len(str(tmp_path))


def test_generation_configs_that_are_fine(tmp_path: Path) -> None:
    for name, values in GOOD.items():
        for value in values:
            assert write(tmp_path, {name: value}) == "", (name, value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cache_implementation": "x"}, "none that transformers takes: Invalid"),
        ({"max_new_tokens": -1}, "none that transformers takes: `max_new_tokens`"),
        ({"watermarking_config": 7}, "none that transformers takes: "),
        ({"compile_config": []}, "none that transformers takes: "),
        ({"eos_token_id": "x"}, "says eos_token_id = 'x'; expected a token id or a list"),
    ],
)
def test_such_a_config_stops_a_build_before_any_work(
    tiny_falcon: Path, tmp_path: Path, values: dict[str, object], said: str
) -> None:
    model = copy_of(tiny_falcon, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps(values))
    done = run_nf4("download", model, "--build-dir", tmp_path / "build")
    check_ending(done)
    assert done.status == 1
    assert said in done.err
    assert not (tmp_path / "build").exists()


def test_a_manifest_without_tensors_is_inspected(exported_falcon: Path, tmp_path: Path) -> None:
    build = copy_of(exported_falcon, tmp_path / "build")
    path = build / "export" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "tensors": []}))
    done = run_nf4("inspect", build)
    assert done.status == 0, done.err
    assert "weight error" not in done.out
    for odd in ("[" * 1500 + "]" * 1500, "{}", "", '{"tensors": ' + "9" * 4000 + "}", "[]", "\0"):
        path.write_text(odd)
        for command in (
            ("inspect", build),
            ("reproduce", build),
            ("check", build, "--key", path),
            ("push", "--build-dir", build, "--repo-id", "a/b", "--dry-run"),
        ):
            done = run_nf4(*command)
            check_ending(done)
            assert done.status == 1, (odd[:20], command)


def test_names_of_paths() -> None:
    for name in ("a", "ü" * 127, "/".join(["d" * 255] * 10), "~", ".", " "):
        assert problem_of(name) is None
        named_path(name)
    for name in ("\0", "ü" * 128, "/".join(["d" * 255] * 17), "\ud800", "\udcff"):
        assert problem_of(name) is not None
        assert "can be no path" in refusal(partial(named_path, name))
    assert "no home folder" in refusal(lambda: named_path("~nobody-of-this-name/x"))
