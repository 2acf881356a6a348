"""The Containerfile: pinned, not root, complete; its steps are run by scripts/campaigns."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import nf4_pipeline
import pytest

ROOT: Final = Path(__file__).parents[1]
TEXT: Final = (ROOT / "Containerfile").read_text("utf-8")


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    path = ROOT / "scripts" / "campaigns" / "run_containerfile.py"
    spec = importlib.util.spec_from_file_location("run_containerfile", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def steps(runner: ModuleType) -> list[Any]:
    found: list[Any] = runner.parse(TEXT)
    return found


def values(steps: list[Any], word: str) -> list[str]:
    return [step.rest for step in steps if step.word == word]


def test_the_runner_knows_every_instruction(runner: ModuleType, steps: list[Any]) -> None:
    assert {f"_{step.word.lower()}" for step in steps} <= set(dir(runner.Builder))


def test_the_base_is_pinned_by_digest(steps: list[Any]) -> None:
    (base,) = [rest for rest in values(steps, "ARG") if rest.startswith("BASE=")]
    assert re.fullmatch(r"BASE=docker\.io/library/python:[\w.-]+@sha256:[0-9a-f]{64}", base)
    assert all(rest.startswith("${BASE}") for rest in values(steps, "FROM"))


def test_it_ends_as_another_user_than_root(steps: list[Any]) -> None:
    assert values(steps, "USER") == ["10001:10001"]
    last = [step.word for step in steps]
    assert "RUN" not in last[last.index("USER") :]


def test_entry_point_and_labels(steps: list[Any]) -> None:
    assert [json.loads(rest) for rest in values(steps, "ENTRYPOINT")] == [["nf4"]]
    assert f"ARG VERSION={nf4_pipeline.__version__}\n" in TEXT
    (labels,) = values(steps, "LABEL")
    for name in ("title", "description", "licenses", "url", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels


def test_what_is_copied_is_sent_to_the_engine(steps: list[Any]) -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    sent = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        name
        for rest in values(steps, "COPY")
        if not rest.startswith("--from")
        for name in rest.split()[:-1]
    }
    assert copied == sent
    assert all((ROOT / name).exists() for name in sent)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("RUN a \\\n    b", [("RUN", "a      b")]),
        ("# c\nRUN a \\\n# between\n  && b\n", [("RUN", "a    && b")]),
        ("from x AS y\n\nUSER 1", [("FROM", "x AS y"), ("USER", "1")]),
    ],
)
def test_instructions_are_read(
    runner: ModuleType, text: str, expected: list[tuple[str, str]]
) -> None:
    assert [(step.word, step.rest) for step in runner.parse(text)] == expected
