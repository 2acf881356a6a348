"""Rows of readers, what the card promises, and what follows for the verdict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nf4_pipeline.readers.document import ReaderResult, reader_checks
from nf4_pipeline.readers.own import judge_own
from nf4_pipeline.readers.promises import promised, published_lines


def _row(**changes: object) -> ReaderResult:
    values = {
        "name": "transformers",
        "version": "5.23.0",
        "promised": True,
        "outcome": "passed",
        "why": "loads",
        "layers": 2,
        "logits_distance": 0.0,
    }
    return ReaderResult.from_json(values | changes)


@pytest.mark.parametrize(("outcome", "passes"), [("passed", True), ("failed", False)])
def test_a_promised_reader_decides(outcome: str, passes: bool) -> None:
    (check,) = reader_checks([_row(outcome=outcome, why="because")])
    assert (check.name, check.passed) == ("read by transformers 5.23.0", passes)
    assert check.found == "because"


def test_what_only_loads_is_said_to() -> None:
    (check,) = reader_checks([_row(outcome="loaded only", why="no such kernel")])
    assert (check.passed, check.found) == (True, "loaded only: no such kernel")


def test_a_promised_reader_that_was_not_tried_is_no_pass() -> None:
    (check,) = reader_checks([_row(outcome="not tried", why="no memory", version=None)])
    assert (check.name, check.passed) == ("read by transformers", False)
    assert check.found == "not tried: no memory"


def test_another_decides_nothing() -> None:
    assert reader_checks([_row(promised=False, outcome="failed")]) == []


def test_promises() -> None:
    every = {"nf4_pipeline", "numpy", "transformers"}
    assert promised("LlamaForCausalLM", ()) == every
    assert promised("FalconForCausalLM", ["h.0.mlp"]) == every
    assert promised("OtherForCausalLM", ["h.0.mlp"]) == {"nf4_pipeline", "numpy"}
    assert published_lines("FalconForCausalLM", ()) is None
    assert published_lines("OtherForCausalLM", ["h.0.mlp"]) is None


@pytest.mark.parametrize(
    ("layers", "lost", "logits", "outcome"),
    [
        (["a"], [], [1.0], "passed"),
        ([], [], [1.0], "failed"),
        (["a"], ["b.weight"], [1.0], "failed"),
        (["a"], [], [float("inf")], "failed"),
    ],
)
def test_our_loader_is_a_reader(
    layers: list[str], lost: list[str], logits: list[float], outcome: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "own.npy", np.array(logits))
    result = judge_own("0.1.0", layers, ["a"], lost, tmp_path / "own.npy")
    assert (result.outcome, result.layers) == (outcome, len(layers)), result.why
