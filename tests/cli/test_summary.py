"""What a person sees at the end: in few lines by default, all of it with -v, each comparison."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.cli.summary import Summary, show_checks, show_summary, show_verdict
from nf4_pipeline.job import STAGES, StageResult
from nf4_pipeline.model.unused_tensors import LeftOut
from nf4_pipeline.records import KINDS, SERIALIZE, SerializeFacts
from nf4_pipeline.verification.document import parse_verification

from tests.support.made import (
    failed_behaviour,
    failed_gate,
    made,
    manifest,
    nulls,
    sample,
    without_tokenizer,
)

LEFT_OUT: Final = (LeftOut("a head for classes", 2, 10_000_000), LeftOut("unused", 3, 1_000))


def all_failed(verification: dict[str, Any]) -> dict[str, Any]:
    checks = [check | {"passed": False} for check in verification["checks"]]
    return verification | {"checks": checks, "verdict": "fail"}


VERIFICATIONS: Final = {
    "passed": made(),
    "calibrated": made(nearest=True, against=True),
    "learned": made(nearest=True, learned=True, against=True),
    "sample": sample(),
    "files": failed_gate(),
    "behaviour": failed_behaviour(),
    "nulls": nulls(),
    "without a tokenizer": without_tokenizer(),
    "all failed": all_failed(made(nearest=True)),
    "all failed, plain": all_failed(sample()),
}


def summary_of(document: dict[str, Any], *, ran: bool = True, more: bool = True) -> Summary:
    """Of a falcon-7b.

    Args:
        document: of its verification.
        ran: whether anything had to be done.
        more: with layers that hide, and tensors that are left out.
    """
    totals = replace(
        manifest().totals,
        original_bytes=14_434_000_000,
        artifact_bytes=4_009_871_204,
        ratio=0.2778,
    )
    facts = SerializeFacts(
        totals=totals,
        hidden_modules=("h.0",) if more else (),
        left_out=LEFT_OUT if more else (),
    )
    nothing = SimpleNamespace(notes=[])
    results = {
        name: StageResult(Record(KINDS[name], "", {}, nothing, 12.5, 10**9), ran) for name in STAGES
    }
    return Summary(
        Build(Path("artifacts/tiiuae--falcon-7b-instruct@8782b5c5d8c9")),
        results,
        Record(SERIALIZE, "", {}, facts, 1.0, 1),
        parse_verification(document),
    )


@pytest.mark.parametrize("name", VERIFICATIONS)
@pytest.mark.parametrize("more", [True, False])
def test_a_summary_has_at_most_twelve_lines(
    name: str, more: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = summary_of(VERIFICATIONS[name], more=more)
    show_summary(summary)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 12
    assert "  size        14.434 GB to 4.010 GB: 72.2% smaller" in lines
    assert "  time        62.5 s, at most 1.000 GB of memory" in lines
    assert any(line.startswith("  left out    5 tensors, 10.00 MB") for line in lines) == more
    failed = summary.verification.failed_checks
    shown = [line for line in lines if line.startswith("  FAIL  ")]
    assert len(shown) >= min(len(failed), 2)
    assert all("(expected: " in line for line in shown)
    checks = summary.verification.checks
    counted = f"  checks      {len(checks) - len(failed)} of {len(checks)} ok"
    hint = "; -v shows all that failed" if len(shown) < len(failed) else ""
    assert counted + hint in lines
    (verdict,) = (line for line in lines if line.startswith("  verdict     "))
    assert verdict.startswith(f"  verdict     {summary.verification.verdict}")
    passed = summary.verification.verdict == "pass"
    assert any(" push " in line for line in lines) == passed
    assert any(line.endswith("export/report.html") for line in lines) != passed
    assert any("fidelity" in line for line in lines) == (name != "files")
    assert any(line.startswith("  loading ") for line in lines) == (passed and more)


@pytest.mark.parametrize("name", VERIFICATIONS)
def test_a_summary_is_readable_at_60_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is to be copied may be wider: paths and commands."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    assert shutil.get_terminal_size().columns == 60
    show_summary(summary_of(VERIFICATIONS[name]))
    lines = capsys.readouterr().out.splitlines()
    wide = [line for line in lines if len(line) > 60]
    assert [line for line in wide if "artifacts/" not in line] == []
    if name == "behaviour":
        assert any(line.startswith("  FAIL  ") and line.endswith("…") for line in lines)
    assert "  fidelity    not" not in "\n".join(lines)


def test_nothing_had_to_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    show_summary(summary_of(made(), ran=False))
    assert "  time        nothing had to be done\n" in capsys.readouterr().out


def test_with_v_every_check_says_what_it_expects(capsys: pytest.CaptureFixture[str]) -> None:
    summary = summary_of(failed_behaviour())
    show_summary(summary, verbose=True)
    out = capsys.readouterr().out
    for check in summary.verification.checks:
        mark = "ok  " if check.passed else "FAIL"
        assert f"  {mark}  {check.name}: {check.found} (expected: {check.expected})\n" in out
    assert "stage         time   peak memory" in out
    assert "  left out    2 tensors, 10.00 MB: a head for classes" in out


def test_ok_and_fail_are_coloured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.delenv("NO_COLOR", raising=False)
    passed, failed = (made(), 32, ("ok", "pass")), (failed_behaviour(), 31, ("FAIL", "fail"))
    for document, colour, words in (passed, failed):
        for show in (show_checks, show_verdict):
            show(parse_verification(document))
            out = capsys.readouterr().out
            assert all(f"\x1b[{colour}m\x1b[1m{word}\x1b[0m" in out for word in words)


def test_a_verdict_alone_shows_what_was_compared(capsys: pytest.CaptureFixture[str]) -> None:
    show_verdict(parse_verification(nulls()))
    out = capsys.readouterr().out
    assert "  fidelity    mean KL not finite\n" in out
    assert "over the other: not finite" in out
    assert out.count("  FAIL  ") == 1
    assert "expected" in out


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
