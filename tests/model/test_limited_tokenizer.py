"""Hostile tokenizers and templates: one error, or a bearable result, in little time and memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from nf4_pipeline.errors import ArtifactError
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer

from tests.support.forks import SECONDS, TEXT, Fork, Forks, forks
from tests.support.hostile_tokenizers import (
    DECODERS,
    TEMPLATES,
    TOKENIZERS,
    write_hostile,
    write_template,
)
from tests.support.tiny import write_tokenizer

_SLOW_MACHINE = 60.0
"""Seconds that nobody's limit stands for: a fork, reading files, a machine that others use."""


@pytest.fixture(scope="module")
def children() -> Iterator[Forks]:
    with forks() as found:
        yield found


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "falcon"}')
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def check(found: Fork, what: str, folder: Path) -> None:
    assert "FOREIGN" not in found.error
    assert "\n" not in found.error
    assert "\x1b" not in found.error
    if found.error:
        assert found.error.startswith((f"The {what} of {folder} ", f"The tokenizer of {folder} "))
        assert found.error.endswith(".")
    assert found.size < 2_000_000
    assert found.peak < 1.2 * 2**30
    assert found.seconds < SECONDS + _SLOW_MACHINE


def test_a_good_one_works(children: Forks, folder: Path) -> None:
    found = children.ask(folder, "decode", 30)
    assert (found.error, found.size) == ("", 128)
    write_template(folder, "{{ messages[0].content }}")
    found = children.ask(folder, "template", 30)
    assert (found.error, found.size) == ("", len(TEXT))


def test_none(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ArtifactError, match=r"has no tokenizer: expected tokenizer\.json"):
        LimitedTokenizer.open(folder)


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates(case: str, children: Forks, folder: Path) -> None:
    write_template(folder, TEMPLATES[case])
    check(children.ask(folder, "template"), "chat template", folder)


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers(case: str, children: Forks, folder: Path) -> None:
    write_hostile(folder, TOKENIZERS[case])
    check(children.ask(folder, "ids"), "tokenizer", folder)


@pytest.mark.parametrize("case", DECODERS)
def test_decoders(case: str, children: Forks, folder: Path) -> None:
    write_hostile(folder, DECODERS[case])
    check(children.ask(folder, "decode"), "tokenizer", folder)
