"""tokenizer_config.json for every version of transformers; what all read is copied exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from nf4_pipeline.manifest.small_files import tokenizer_config

from tests.support.tiny import write_tokenizer


@pytest.mark.parametrize(
    ("said", "stored"),
    [
        (
            {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend"},
            {"backend": "tokenizers", "tokenizer_class": "PreTrainedTokenizerFast"},
        ),
        (
            {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": ["<x>"]},
            {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<x>"]},
        ),
        ({"auto_map": {"AutoTokenizer": "x"}, "eos_token": "</s>"}, {"eos_token": "</s>"}),
    ],
)
def test_what_is_changed(said: object, stored: object, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(said))
    assert json.loads(tokenizer_config(path)) == stored


@pytest.mark.parametrize(
    "text",
    [
        '{"tokenizer_class":  "GPT2Tokenizer"}',
        '{"extra_special_tokens": {"image_token": "<image>"}}',
        '{"chat_template": "TokenizersBackend is \\"TokenizersBackend\\""}',
        '{"not JSON": ',
    ],
)
def test_what_is_copied_exactly(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(text)
    assert tokenizer_config(path) == text.encode()


def test_transformers_5_reads_it_as_before(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    load = transformers.AutoTokenizer.from_pretrained
    before = load(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    assert json.loads(path.read_text())["tokenizer_class"] == "TokenizersBackend"
    path.write_bytes(tokenizer_config(path))
    after = load(tmp_path)
    assert type(after) is type(before)
    assert after("Hello <|endoftext|>")["input_ids"] == before("Hello <|endoftext|>")["input_ids"]
    assert after.all_special_tokens == before.all_special_tokens
