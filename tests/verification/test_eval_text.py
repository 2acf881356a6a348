"""A text becomes sequences of tokens: spread, even over domains, no more than were asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.errors import RecipeError
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.verification.compare_models import _waves
from nf4_pipeline.verification.eval_text import (
    BUILT_IN,
    LENGTH,
    RANDOM,
    TEXTS,
    Text,
    TokenSequence,
    cut,
    most_passes,
    random_sequences,
    read_text,
)
from tokenizers.processors import TemplateProcessing

from tests.support.checkpoints import write_tokenizer

# Every 26 letters make one token each, so a position in a text can be read from its token.
LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LimitedTokenizer:
    """One token a byte, and nothing put before or behind a text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return LimitedTokenizer.open(folder)


def with_template(limited: LimitedTokenizer, template: str) -> LimitedTokenizer:
    tokenizer = limited.tokenizer
    copy = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token
    )
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    copy.backend_tokenizer.post_processor = TemplateProcessing(
        single=template.replace("END", end[0]), special_tokens=[end]
    )
    return LimitedTokenizer(copy)


def words(tokenizer: LimitedTokenizer, sequence: TokenSequence) -> str:
    return str(tokenizer.tokenizer.decode(sequence.ids))


def text(**domains: str) -> Text:
    return Text("made", domains)


def test_the_built_in_text_by_domain() -> None:
    found = read_text(None)
    assert found.name == BUILT_IN
    assert list(found.domains) == ["arithmetic", "code", "dialogue", "instructions", "prose"]
    for name, words in found.domains.items():
        assert words == (TEXTS / f"{name}.txt").read_text("utf-8")


def test_the_built_in_text_in_8192_tokens(tokenizer: LimitedTokenizer) -> None:
    found = cut(read_text(None), tokenizer, 8192, None)
    tokens = {name: 0 for name in read_text(None).domains}
    for sequence in found:
        tokens[sequence.domain] += len(sequence.ids)
        assert sequence.ids.dtype == np.int64
    assert set(tokens.values()) == {8192 // 5}
    assert max(len(sequence.ids) for sequence in found) <= LENGTH
    assert min(len(sequence.ids) for sequence in found) > LENGTH // 2


def test_a_text_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "my words.txt"
    path.write_text("Ein Satz.\n", "utf-8")
    found = read_text(path)
    assert (found.name, dict(found.domains)) == ("my words.txt", {"my words": "Ein Satz.\n"})
    assert found.sha256 == hashlib.sha256(b"my words\0Ein Satz.\n").hexdigest()
    path.write_text("Ein Satz!\n", "utf-8")
    assert read_text(path).sha256 != found.sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"my\.txt cannot be read: .*No such file"),
        (b"", r"my\.txt is empty\. Name one"),
        (b" \n\t\n", r"my\.txt is empty"),
        (b"caf\xe9", r"my\.txt cannot be read: .*UTF-8"),
    ],
)
def test_a_text_that_cannot_be_used(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "my.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        read_text(path)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_text(tmp_path)


def test_no_text_has_no_hash() -> None:
    assert Text(RANDOM, {}).sha256 is None


def test_windows_are_spread_over_a_text(tokenizer: LimitedTokenizer) -> None:
    """A quarter of it is read: the beginning of each quarter, none of it twice."""
    long = "".join(letter * 400 for letter in LETTERS[:10])
    found = cut(text(some=long), tokenizer, 1000, 250)
    assert [words(tokenizer, s) for s in found] == [
        long[start : start + 250] for start in (0, 1000, 2000, 3000)
    ]


def test_a_text_that_is_read_whole(tokenizer: LimitedTokenizer) -> None:
    whole = LETTERS * 50
    found = cut(text(some=whole), tokenizer, 10_000, 512)
    assert "".join(words(tokenizer, sequence) for sequence in found) == whole
    assert [len(sequence.ids) for sequence in found] == [434, 433, 433]


def test_domains_have_equal_shares_and_a_short_one_is_read_whole(
    tokenizer: LimitedTokenizer,
) -> None:
    found = cut(text(long=LETTERS * 20, short="abcdefgh", other=LETTERS), tokenizer, 60, None)
    read = {domain: "" for domain in ("long", "short", "other")}
    for sequence in found:
        read[sequence.domain] += words(tokenizer, sequence)
    assert {name: len(part) for name, part in read.items()} == {"long": 20, "short": 8, "other": 20}
    assert read["short"] == "abcdefgh"
    assert [s.domain for s in found] == ["long", "short", "other"]


def test_every_sequence_begins_as_the_tokenizer_begins_a_text(tokenizer: LimitedTokenizer) -> None:
    begun = with_template(tokenizer, "END $A")
    found = cut(text(some=LETTERS * 10), begun, 100, 21)
    assert len(found) == 5
    for sequence in found:
        assert sequence.ids[0] == tokenizer.tokenizer.eos_token_id
        assert tokenizer.tokenizer.eos_token_id not in sequence.ids[1:]
        assert len(sequence.ids) == 21  # with it, as many as the model takes


def test_what_a_tokenizer_puts_behind_a_text_is_left_out(tokenizer: LimitedTokenizer) -> None:
    for template in ("$A END", "END $A END"):
        plain = cut(text(some=LETTERS * 10), with_template(tokenizer, template), 60, None)
        assert [words(tokenizer, s).removeprefix(tokenizer.tokenizer.eos_token) for s in plain] == [
            (LETTERS * 3)[:60]
        ]


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    tokens=st.integers(2, 700),
    context=st.one_of(st.none(), st.integers(2, 40), st.integers(500, 4096)),
    begins=st.booleans(),
)
def test_never_too_much(
    tokenizer: LimitedTokenizer, lengths: list[int], tokens: int, context: int | None, begins: bool
) -> None:
    reader = with_template(tokenizer, "END $A") if begins else tokenizer
    domains = {LETTERS[i]: LETTERS[i] * length for i, length in enumerate(lengths)}
    share = tokens // len(domains)
    try:
        found = cut(text(**domains), reader, tokens, context)
    except RecipeError:
        assert min(share, max(lengths)) < 2
        return
    read = dict.fromkeys(domains, 0)
    for sequence in found:
        assert 2 <= len(sequence.ids) <= min(LENGTH, context or LENGTH)
        read[sequence.domain] += len(sequence.ids) - begins
    for name, length in zip(domains, lengths, strict=True):
        # One lone token is left out: nothing is asked after it.
        wanted = min(share, length)
        assert wanted - len(found) <= read[name] <= wanted
    assert 0 < sum(read.values()) <= tokens


@pytest.mark.parametrize("tokens", [2, 4, 9])
def test_too_few_tokens_for_all_domains(tokenizer: LimitedTokenizer, tokens: int) -> None:
    with pytest.raises(RecipeError, match=rf"{tokens} tokens .* 5 domains"):
        cut(read_text(None), tokenizer, tokens, None)


def test_a_text_of_one_token(tokenizer: LimitedTokenizer) -> None:
    with pytest.raises(RecipeError, match=r"the text made .* two tokens"):
        cut(text(some="a"), tokenizer, 100, None)


@pytest.mark.parametrize(
    ("tokens", "context", "shape"),
    [(8192, 2048, (16, 512)), (8192, None, (16, 512)), (300, 128, (2, 128)), (64, None, (1, 64))],
)
def test_random_ids(tokens: int, context: int | None, shape: tuple[int, int]) -> None:
    found = random_sequences(50, tokens, context)
    assert (len(found), len(found[0].ids)) == shape
    ids = np.stack([sequence.ids for sequence in found])
    assert (ids.min() >= 0) & (ids.max() < 50)
    assert len(np.unique(ids)) > 25
    again = np.stack([sequence.ids for sequence in random_sequences(50, tokens, context)])
    assert np.array_equal(ids, again)
    assert {sequence.domain for sequence in found} == {RANDOM}


@pytest.mark.parametrize("tokens", [1, 512, 8_192, 16_384, 20_000, 32_768, 65_536])
@pytest.mark.parametrize("begins", [0, 1])
def test_passes_are_no_more_than_foretold(
    tokenizer: LimitedTokenizer, tokens: int, begins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the tokenizer puts something in front of each sequence or not."""
    monkeypatch.setattr(LimitedTokenizer, "prefix", lambda _: [7] * begins)
    text = Text("long", {"one": LETTERS * 3_000, "two": LETTERS * 3_000})
    passes = len(list(_waves(cut(text, tokenizer, tokens, None)))) if tokens > 1 else 1
    assert passes <= most_passes(tokens) <= passes + 1
