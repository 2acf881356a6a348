"""What a person sees of a comparison: with what, each figure, and the ratio."""

from __future__ import annotations

import pytest
from nf4_pipeline.cli.summary import show_checks
from nf4_pipeline.verification.document import parse_verification

from tests.support.made import made, nulls


def test_what_the_artifact_was_compared_with(capsys: pytest.CaptureFixture[str]) -> None:
    show_checks(parse_verification(made(nearest=True, against=True)))
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split() for line in lines if "this artifact" in line]
    assert heads == [
        ["this", "artifact", *name.split()] for name in ("round to nearest", "the other")
    ]
    (first, second) = (line for line in lines if line.startswith("  mean KL  "))
    assert first.split() == "mean KL 0.0213 [0.0200, 0.0226] 0.0561 [0.0527, 0.0595]".split()
    assert second.split() == "mean KL 0.0213 [0.0200, 0.0226] 0.0178 [0.0167, 0.0189]".split()
    assert "  mean KL of this one over round to nearest: 0.3797 [0.3645, 0.3949]" in lines
    assert "  mean KL of this one over the other: 1.1970 [1.1491, 1.2449]" in lines
    for title in ("99th percentile of KL", "same next token", "where 16 bit is sure", "perplexity"):
        assert sum(title in line for line in lines) >= 2


def test_a_plain_artifact_is_compared_with_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    show_checks(parse_verification(made()))
    out = capsys.readouterr().out
    assert "verdict" in out
    assert "this artifact" not in out
    assert "of this one over" not in out


def test_what_is_not_finite_is_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    show_checks(parse_verification(nulls()))
    out = capsys.readouterr().out
    assert "over round to nearest: not finite" in out
    assert "None" not in out
