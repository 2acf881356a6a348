"""Prompts become tokens once, and generation stays inside what a model takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from nf4_pipeline.errors import ArtifactError, UsageError
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.runtime.generate import Generator, Sampling
from tokenizers.processors import TemplateProcessing

from tests.support.checkpoints import write_tokenizer


@pytest.fixture
def generator(tmp_path: Path) -> Generator:
    """A tiny GPT-2 of 32 positions, whose tokenizer puts a token before every text."""
    write_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{eos} $A", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=64, n_layer=1, n_head=2, n_positions=32, eos_token_id=299
    )
    return Generator(transformers.GPT2LMHeadModel(config).eval(), LimitedTokenizer(tokenizer))


def test_a_template_writes_its_special_tokens_itself(generator: Generator) -> None:
    start = generator.tokenizer.special_id("eos_token_id")
    generator.tokenizer.tokenizer.chat_template = "{{ eos_token }}{{ messages[0]['content'] }}"
    assert generator.encode("hello")[0, :2].tolist().count(start) == 1
    assert generator.encode("hello", chat=True)[0, :2].tolist().count(start) == 1
    assert torch.equal(generator.encode("hello"), generator.encode("hello", chat=True))


def test_answers_end_where_the_positions_end(generator: Generator) -> None:
    prompt_tokens = generator.encode("hello").shape[1]
    answer = generator.answer("hello", Sampling(max_new_tokens=500))[0]
    assert answer.tokens <= 32 - prompt_tokens
    with pytest.raises(UsageError, match="this model takes 32"):
        generator.answer("z" * 100, Sampling())


def test_a_template_that_fails_is_named(generator: Generator) -> None:
    generator.tokenizer.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        ArtifactError, match=r"chat template of .* fails: roles must alternate. Take it out"
    ):
        generator.encode("hello", chat=True)


@pytest.mark.parametrize("chat", [False, True])
def test_an_empty_prompt_is_refused_with_and_without_a_template(
    generator: Generator, chat: bool
) -> None:
    with pytest.raises(UsageError, match="empty"):
        generator.encode("  ", chat=chat)
