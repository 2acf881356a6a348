"""Options, arguments and the files that they name, with values of every kind: one clear message."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4_pipeline.recipe import parse_recipe, parse_size, read_tables
from nf4_pipeline.runtime.artifact import find_model
from nf4_pipeline.runtime.generate import Sampling
from nf4_pipeline.verification.eval_text import read_text
from nf4_pipeline.verification.prompts import read_prompts

from tests.support.command_line import check_ending, refusal, run_nf4

NUMBERS: Final = [
    "", " ", "9" * 30, "9" * 400, "9" * 5000, "\n", "\t1", "1\n",
    *"0 -1 1 -0 +1 007 1_000 2**64 18446744073709551616 9223372036854775808 -9223372036854775809 "
    "1e3 1e400 -1e400 nan NaN inf -inf 0x10 1.5 1e-320 ٣ ² 1,000 1GB GB -1GB 1e9GB nanGB 0.5B "
    "auto cpu cuda cuda:0 cuda:-1 cuda:² cuda:99999999999999999999 gpu 5% -5% nan% 101%"
.split(),
]  # fmt: skip
PATHS: Final = (
    "", " ", ".", "/", "..", "~", "~nobody-of-this-name/x", "\0", "a\0b", "n" * 300, "é" * 200,
    "/".join(["d" * 200] * 30), os.fsdecode(b"\xff\xfe"), "\ud800", "/dev/null", "/dev/zero/x",
    "/proc/self/mem", "\x1b[31m", "a\nb", "-", "--", "LOOP", "LOOP/x", "FILE", "FILE/x", "FOLDER",
)  # fmt: skip
NUMERIC: Final = (
    ("verify", "--eval-tokens"),
    ("verify", "--device-memory"),
    ("build FOLDER", "--eval-tokens"),
    ("build FOLDER", "--max-shard-size"),
    ("quantize", "--workers"),
    ("quantize", "--memory-budget"),
    ("quantize", "--extra-bytes"),
    ("quantize", "--device"),
    ("serialize", "--max-shard-size"),
    ("reproduce FOLDER", "--workers"),
    ("reproduce FOLDER", "--memory-budget"),
    ("reproduce FOLDER", "--device"),
    ("prompt FILE x", "--max-length"),
    ("prompt FILE x", "--max-new-tokens"),
    ("prompt FILE x", "--top-k"),
    ("prompt FILE x", "--top-p"),
    ("prompt FILE x", "--temperature"),
    ("prompt FILE x", "--num-return-sequences"),
    ("prompt FILE x", "--seed"),
    ("prompt FILE x", "--device"),
)
NAMING: Final = (
    "build @", "build FOLDER --build-dir @", "build FOLDER --recipe @",
    "build FOLDER --calibrate @", "build FOLDER --prompts @", "build FOLDER --eval-text @",
    "download @", "download FOLDER --build-dir @", "download a/b --offline --revision @",
    "download FOLDER --allow-unused @", "download FOLDER --strip-prefix @",
    "quantize @", "quantize --build-dir @", "quantize --recipe @", "serialize @", "verify @",
    "verify --build-dir @", "verify --prompts @", "verify --eval-text @", "verify --against @",
    "attest @", "attest --build-dir @", "push @ --repo-id a/b", "push --build-dir @ --repo-id a/b",
    "push --repo-id @", "prompt @ x", "prompt FILE @", "inspect @", "reproduce @",
    "reproduce FOLDER --source @", "sign @ --key FILE", "sign FOLDER --key @",
    "check @ --key FILE", "check FOLDER --key @", "status @", "status --build-dir @",
    "status --recipe @", "@", "doctor @", "--@",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file, a folder and a link to itself."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "FILE").write_text("x")
    (folder / "FOLDER").mkdir()
    (folder / "LOOP").symlink_to("LOOP")
    return folder


@pytest.fixture(autouse=True)
def in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Other tests may have had the client read its environment before.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(("command", "option"), NUMERIC, ids=lambda value: value)
def test_any_number(command: str, option: str) -> None:
    for value in NUMBERS:
        done = run_nf4(*command.split(), option, value)
        check_ending(done)
        assert done.status in (1, 2)  # there is no build, and no model


@pytest.mark.parametrize("command", NAMING)
def test_any_name(command: str, place: Path) -> None:
    for value in PATHS:
        done = run_nf4(*(part.replace("@", value) for part in command.split()))
        check_ending(done)
    assert sorted(path.name for path in place.iterdir()) == ["FILE", "FOLDER", "LOOP"]
    assert not any((place / "FOLDER").iterdir())


numbers = st.integers() | st.integers(-3, 3).map(lambda n: n * 10**30) | st.none()
reals = st.floats() | st.integers() | st.none()


@settings(max_examples=300)
@given(numbers, numbers, numbers, reals, reals, numbers, st.integers() | st.just(2**64))
def test_any_sampling_is_one_that_torch_takes_or_is_refused(
    length: int | None,
    new: int | None,
    k: int | None,
    p: float | None,
    temperature: float | None,
    count: int | None,
    seed: int,
) -> None:
    import torch

    values = (length, new, k, p, temperature, 1 if count is None else count, seed)
    if message := refusal(lambda: Sampling(*values)):
        assert len(message) < 200
        return
    made = Sampling(*values)
    torch.manual_seed(made.seed)
    logits = torch.tensor([-3e4, 0.0, 3e4])
    if made.temperature:
        assert torch.isfinite(torch.softmax(logits / made.temperature, 0)).all()
    for value in (made.max_length, made.max_new_tokens, made.top_k, made.num_return_sequences):
        assert value is None or 1 <= value < 2**31


@given(st.text(max_size=30) | st.from_regex(r"[0-9]{1,400}(\.[0-9]{1,30})? ?[kKMGgTi]*[bB]?"))
def test_any_size(text: str) -> None:
    if message := refusal(lambda: parse_size(text, "--memory-budget")):
        assert len(message) < 300
    else:
        assert 0 <= parse_size(text, "--memory-budget") < 2**63


@given(st.text(st.characters(), max_size=40))
def test_any_name_of_a_model(name: str) -> None:
    message = refusal(lambda: find_model(name))
    assert "\n" not in message or "\n" in name


# Files

values = st.recursive(
    st.integers() | st.floats() | st.booleans() | st.text(max_size=10) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(
    "skip_modules calibrate calibration_tokens extra_bytes effort rounding allow_unused "
    "strip_prefix max_shard_size prompts max_new_tokens eval_text eval_tokens max_mean_kl "
    "min_sure_agreement max_perplexity_ratio max_accuracy_drop x".split()
)
tables = st.dictionaries(
    st.sampled_from(["quantize", "serialize", "verify", "x", "\x1b"]),
    st.dictionaries(keys, values, max_size=4) | values,
    max_size=3,
)


@settings(max_examples=400)
@given(tables)
def test_any_recipe(recipe: dict[str, object]) -> None:
    if message := refusal(lambda: parse_recipe(recipe, "recipe.toml")):
        assert len(message) < 700
        return
    made = parse_recipe(recipe, "recipe.toml")
    made.verify.__post_init__()
    assert made.verify.max_mean_kl < float("inf")
    for name in ("quantize", "serialize", "verify"):
        made.table(name)


DEEP: Final = 100_000
ODD: Final = {
    "bytes": bytes(range(256)),
    "nothing": b"",
    "NUL": b"\0" * 100,
    "a mark": b"\xef\xbb\xbf",
    "UTF-16": "[verify]\n".encode("utf-16"),
    "half a character": b'{"prompt": "\\ud800"}',
    "lists": b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "open lists": b"x = " + b"[" * DEEP,
    "objects": b'{"a": ' * 1500 + b"1" + b"}" * 1500,
    "dots": b"a" + b".a" * DEEP + b" = 1",
    "4,000 digits": b'{"prompt": "x", "y": ' + b"9" * 4000 + b"}",
    "5,000 digits": b"[verify]\neval_tokens = " + b"9" * 5000,
    "400 digits": b"[verify]\nmax_mean_kl = " + b"9" * 400,
    "no date": b"[verify]\neval_tokens = 2001-13-45",
    "twice": b'{"prompt": "x", "prompt": "y"}',
    "NaN": b'{"prompt": "x", "expect": NaN}',
    "a list": b"[]",
    "a number": b"1",
    "no text": b'{"prompt": 3}',
    "a path with NUL": b'[verify]\nprompts = "a\\u0000b"',
    "a path of 5,000 letters": b'[quantize]\ncalibrate = "' + b"a" * 5000 + b'"',
    "controls": b'[verify]\n"\\u001b[31m" = "\\u0007"',
    "one line of a megabyte": b'{"prompt": "' + b"x " * 500_000 + b'"}',
}
READERS: Final[dict[str, Callable[[Path], object]]] = {
    "recipe": lambda path: parse_recipe(read_tables(path), str(path)),
    "prompts": read_prompts,
    "eval-text": read_text,
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("reader", READERS)
def test_an_odd_file(reader: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(ODD[kind])
    assert len(refusal(lambda: READERS[reader](path))) < 700 + len(str(tmp_path))


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any-bytes"
    path.write_bytes(content)
    for read in READERS.values():
        assert len(refusal(partial(read, path))) < 700 + len(str(path))
