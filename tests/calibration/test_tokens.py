"""Tokens to calibrate on: what the model writes, what a file gives, what was kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
from nf4_pipeline.blocks.streamed_model import StreamedModel
from nf4_pipeline.calibration.sampling import make_tokens
from nf4_pipeline.calibration.tokens import (
    CalibrationTokens,
    parse_tokens,
    read_tokens,
    tokens_of_text,
)
from nf4_pipeline.errors import CheckpointError, RecipeError
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.progress import SILENT

from tests.support.checkpoints import make_checkpoint
from tests.support.tiny import edit_json

pytestmark = pytest.mark.usefixtures("workers_here")

CHAT: Final = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of bytes and a context of 128."""
    return make_checkpoint(tmp_path_factory.mktemp("tokens") / "llama", "llama")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template."""
    folder = make_checkpoint(tmp_path_factory.mktemp("tokens") / "chatty", "llama")
    edit_json(folder / "tokenizer_config.json", chat_template=CHAT)
    return folder


def sampled(source: Path, count: int = 1024) -> CalibrationTokens:
    return make_tokens(source, None, count, "key", "cpu", SILENT)


def test_the_model_writes_as_much_as_was_asked_for(llama: Path) -> None:
    tokens = sampled(llama, 1300)
    assert tokens.ids.shape == (10, 128)  # not longer than the context
    assert tokens.ids.dtype == np.int32
    assert tokens.source == "self"
    assert tokens.ids.min() >= 0
    assert tokens.ids.max() < 257
    assert len({row.tobytes() for row in tokens.ids}) == 10
    # Bytes of a random model: far from one another, and of every kind.
    assert len(np.unique(tokens.ids)) > 200
    assert sampled(llama, 1300).sha256 == tokens.sha256


def test_a_long_context_is_cut(llama: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "falcon", "falcon-rw")
    assert sampled(folder, 600).ids.shape == (2, 256)


def test_a_text_that_ends_goes_on(tmp_path: Path) -> None:
    """The first token after which generate() would stop comes early, and more follow."""
    folder = make_checkpoint(tmp_path / "llama", "llama")
    edit_json(folder / "config.json", eos_token_id=[256, *range(200)])
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": list(range(200)), "max_length": 5, "temperature": 0.0001})
    )
    tokens = sampled(folder, 512)
    assert tokens.ids.shape == (4, 128)
    after = [int(np.argmax(row[1:] < 200)) for row in tokens.ids]
    assert max(after) < 60
    assert len(np.unique(tokens.ids[:, 64:])) > 100


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "llama", "llama")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert sampled(folder, 256).ids.shape == (2, 128)
    text = tmp_path / "text.txt"
    text.write_text("Words " * 100)
    with pytest.raises(RecipeError, match=r"text\.txt needs a tokenizer.*--calibrate self"):
        make_tokens(folder, text, 256, "key", "cpu", SILENT)


def test_a_model_that_does_not_fit_writes_the_same(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sampled(llama, 1024)
    held: list[bool] = []

    def hold_nothing(self: StreamedModel, spare: int, spare_if_not: int) -> bool:
        held.append(False)
        return False

    monkeypatch.setattr(StreamedModel, "hold_what_fits", hold_nothing)
    assert sampled(llama, 1024).sha256 == whole.sha256
    assert held == [False]


def test_a_model_that_says_nan_is_told(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint(tmp_path / "llama", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"says NaN.*--calibrate FILE"):
        sampled(folder, 256)


def test_random_numbers_of_others_are_not_disturbed(llama: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sampled(llama, 256)
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> LimitedTokenizer:
    return LimitedTokenizer.open(llama)


def test_a_text_is_read_evenly(tokenizer: LimitedTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    words = "".join(f"{number:07d} " for number in range(100))  # eight tokens each
    path.write_text(words)
    rows = tokens_of_text(path, tokenizer, 3, 32)
    assert rows.shape == (3, 32)
    decoded = [tokenizer.tokenizer.decode(row) for row in rows]
    assert [text.split()[0] for text in decoded] == ["0000000", "0000048", "0000096"]
    assert all(text in words for text in decoded)
    assert tokens_of_text(path, tokenizer, 1000, 32).shape == (25, 32)  # all there is
    assert tokens_of_text(path, tokenizer, 1, 32).shape == (1, 32)


def test_lines_of_json(chatty: Path, tokenizer: LimitedTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    lines = [{"text": "abc"}, {"prompt": "de", "more": 1}, {"messages": talk}]
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\r\n")
    plain = tokenizer.tokenizer.decode(tokens_of_text(path, tokenizer, 1, 10)[0])
    assert plain == "abc<|endoftext|>de<|endoftext|>Hi\n"
    with_template = LimitedTokenizer.open(chatty)
    row = tokens_of_text(path, with_template, 1, 28)[0]
    expected = "abc<|endoftext|>de<|endoftext|><user>Hi<assistant>Ho"
    assert with_template.tokenizer.decode(row) == expected


WRONG: Final[dict[str, tuple[str, str]]] = {
    "no json": ('{"text": "a"}\n{"text": \n', "line 2: expected an object"),
    "a list": ('\n\n["text"]\n', "line 3: expected an object"),
    "a number": ("5\n", "line 1"),
    "null": ("null\n", "line 1"),
    "no known key": ('{"body": "x"}\n', "line 1.*'prompt'"),
    "a list of texts": ('{"text": ["a", "b"]}\n', "line 1.*a list where a text"),
    "a number as text": ('{"text": 5}\n', "line 1.*an? int where a text"),
    "no text": ('{"text": null}\n', "line 1"),
    "messages without content": ('{"messages": [{"role": "user"}]}\n', "line 1"),
    "messages that are none": ('{"messages": ["hello"]}\n', "line 1"),
}


@pytest.mark.parametrize(
    ("case", "template"),
    [
        *((case, False) for case in WRONG),
        # What to make of messages without content is the template's business.
        *((case, True) for case in WRONG if case != "messages without content"),
    ],
)
def test_lines_that_are_wrong(
    case: str, template: bool, chatty: Path, tokenizer: LimitedTokenizer, tmp_path: Path
) -> None:
    content, message = WRONG[case]
    path = tmp_path / "talks.jsonl"
    path.write_text(content + '{"text": "' + "x" * 300 + '"}\n')
    with pytest.raises(RecipeError, match=message) as caught:
        tokens_of_text(path, LimitedTokenizer.open(chatty) if template else tokenizer, 2, 128)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "has 0 tokens; expected at least 128, better 256"),
        ("empty.jsonl", b"\n\n", "has 0 tokens; expected at least 128"),
        ("short.txt", b"x" * 127, "has 127 tokens; expected at least 128"),
        ("latin.txt", b"caf\xe9" * 200, "cannot be read: it is not UTF-8 .*; save it as UTF-8"),
        (
            "latin.jsonl",
            b'{"text": "caf\xe9"}',
            "cannot be read: it is not UTF-8 .*; save it as UTF-8",
        ),
    ],
)
def test_files_that_cannot_be_used(
    name: str, content: bytes, message: str, tokenizer: LimitedTokenizer, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        tokens_of_text(tmp_path / name, tokenizer, 2, 128)
    assert name in str(caught.value)


def tokens() -> CalibrationTokens:
    return CalibrationTokens(np.arange(12, dtype=np.int32).reshape(3, 4), "self", "k")


def test_tokens_survive_json(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(tokens().document().to_json()))
    found = read_tokens(path)
    assert found is not None
    assert (found.ids == tokens().ids).all()
    assert (found.source, found.key, found.sha256) == ("self", "k", tokens().sha256)


def test_the_hash_knows_ids_and_shape() -> None:
    ids = tokens().ids
    hashes = {
        CalibrationTokens(changed, "self", "k").sha256
        for changed in (ids, ids.reshape(4, 3), ids + 1, ids[:2])
    }
    assert len(hashes) == 4
    assert CalibrationTokens(ids, "text", "other").sha256 == tokens().sha256


DAMAGE: Final[dict[str, Callable[[str], str]]] = {
    "empty": lambda text: "",
    "torn": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[]",
    "no ids": lambda text: json.dumps({**json.loads(text), "ids": None}),
    "ragged": lambda text: json.dumps({**json.loads(text), "ids": [[1, 2], [3]]}),
    "flat": lambda text: json.dumps({**json.loads(text), "ids": [1, 2, 3]}),
    "below zero": lambda text: json.dumps({**json.loads(text), "ids": [[1, -2]]}),
    "much too large": lambda text: json.dumps({**json.loads(text), "ids": [[1, 2**80]]}),
    "truths": lambda text: json.dumps({**json.loads(text), "ids": [[True, False]]}),
    "too large": lambda text: json.dumps({**json.loads(text), "ids": [[1, 2**40]]}),
    "words": lambda text: json.dumps({**json.loads(text), "ids": [["a", "b"]]}),
    "fractions": lambda text: json.dumps({**json.loads(text), "ids": [[1.5, 2.5]]}),
    "no row": lambda text: json.dumps({**json.loads(text), "ids": []}),
    "empty rows": lambda text: json.dumps({**json.loads(text), "ids": [[], []]}),
    "no key": lambda text: json.dumps({"ids": [[1, 2]], "source": "self"}),
    "binary": lambda text: "\x00\x01",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tokens_are_not_believed(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(DAMAGE[damage](json.dumps(tokens().document().to_json())))
    assert read_tokens(path) is None
    assert read_tokens(tmp_path / "none.json") is None


def test_other_json_is_an_error_with_a_name() -> None:
    with pytest.raises(RecipeError, match="no calibration tokens"):
        parse_tokens({"ids": [[1]]})
