"""The tokens on which two models differ most: found, and quoted where that is allowed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.fidelity.token_scores import score_tokens
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.sample import MODEL_DIR
from nf4_pipeline.verification import eval_text
from nf4_pipeline.verification.eval_text import Text, TokenSequence, read_text
from nf4_pipeline.verification.worst_tokens import WorstTokens

VOCABULARY = 12


def looked_at(
    seed: int, lengths: list[int]
) -> tuple[WorstTokens, list[TokenSequence], list[float]]:
    """Two random models over sequences; the KL of every token, the largest first."""
    generator = torch.Generator().manual_seed(seed)
    worst, sequences, kl = WorstTokens(), list[TokenSequence](), list[float]()
    for number, length in enumerate(lengths):
        ids = torch.randint(VOCABULARY, (length,), generator=generator)
        one, other = torch.randn(2, length - 1, VOCABULARY, generator=generator)
        scores = score_tokens(one, other, ids[1:])
        worst.add(number, scores, one, other, ids[1:])
        sequences.append(TokenSequence(f"domain {number % 2}", ids.numpy().astype(np.int64)))
        kl += scores.kl.tolist()
    return worst, sequences, sorted(kl, reverse=True)


@given(st.integers(0, 2**31), st.lists(st.integers(2, 9), min_size=1, max_size=6))
def test_the_worst_of_all_sequences_are_kept_in_order(seed: int, lengths: list[int]) -> None:
    worst, sequences, kl = looked_at(seed, lengths)
    found = worst.quoted(sequences, None)
    assert [token.kl for token in found] == pytest.approx(kl[:8], rel=1e-5)
    for token in found:
        assert 0 < token.position < lengths[token.sequence]
        assert token.domain == f"domain {token.sequence % 2}"
        # Nothing of a text that is the user's own.
        assert (token.before, token.actual, token.chances) == (None, None, ())


def test_both_distributions_are_those_of_the_models() -> None:
    tokenizer = LimitedTokenizer.open(MODEL_DIR)
    ids = tokenizer.ids("Once upon a time, there was a clever fox named Ben.")
    rows = max(ids) + 1
    before, after = torch.zeros(len(ids) - 1, rows), torch.zeros(len(ids) - 1, rows)
    before[4, ids[5]], after[4, 7] = 9.0, 8.0
    targets = torch.tensor(ids[1:])
    worst = WorstTokens()
    worst.add(0, score_tokens(before, after, targets), before, after, targets)
    (token,) = worst.quoted([TokenSequence("prose", np.asarray(ids))], tokenizer)
    assert token.position == 5
    assert token.before == tokenizer.decode(ids[:5])
    assert token.actual == ids[5]
    chances = {chance.id: chance for chance in token.chances}
    assert token.chances[0].id == ids[5]  # the 16-bit model's first choice comes first
    assert chances[ids[5]].text == tokenizer.decode([ids[5]])
    expected = [float(torch.softmax(logits[4], -1)[7]) for logits in (before, after)]
    assert [chances[7].in_16_bit, chances[7].in_4_bit] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_worst_token(broken: float) -> None:
    logits, targets = torch.randn(3, 5), torch.tensor([0, 1, 2])
    other = logits + 1.0 * torch.randn(3, 5)
    other[1] = broken
    worst = WorstTokens()
    worst.add(0, score_tokens(logits, other, targets), logits, other, targets)
    found = worst.quoted([TokenSequence("a", np.arange(4))], None)
    assert 2 not in {token.position for token in found}
    assert len(found) == 2


def test_only_what_comes_with_the_package_may_be_quoted(tmp_path: Path) -> None:
    assert read_text(None).is_public
    (tmp_path / "mine.txt").write_text("Private words.")
    assert not read_text(tmp_path / "mine.txt").is_public
    assert not Text(eval_text.RANDOM, {}).is_public
