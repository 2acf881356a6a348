"""What the documents show is run, or says beside itself why it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import hub_uploads
from tests.support.doc_blocks import (
    DOCS,
    RUN,
    Block,
    blocks_of,
    fault_of,
    faults,
    inline_commands,
    pages,
)
from tests.support.doc_order import VARIABLES, order, serve
from tests.support.hub_client import isolated
from tests.support.hub_server import HubServer

assert hub_uploads  # its routes are registered by importing it

MISTAKES: Final = "messages.md"
"""The page of what is typed wrong."""


def all_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks_of(page)]


def test_every_block_can_be_read() -> None:
    found = all_blocks()
    assert sum(block.language in RUN for block in found) > 60
    assert {str(block): what for block in found if (what := faults(block))} == {}


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.relative_to(DOCS).as_posix())
def test_commands_in_the_text_exist(page: Path) -> None:
    if page.name != MISTAKES:
        lines = inline_commands(page)
        assert [fault for line in lines if (fault := fault_of(line, whole=False))] == []


WRONG: Final = {
    "nf4 biuld sample": "no command",
    "nf4 build sample --claibrate self": "--claibrate",
    "nf4 build": "missing",
    "nf4 push sample": "missing",
    "HF_HOME=x nf4 prompt sample": "missing",
    "nf4 status && nf4 stauts": "no command",
    "nf4 verify sample --eval-tokens": "argument",
    'nf4 prompt sample "once': "quotation",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_line_is_found(line: str) -> None:
    assert WRONG[line] in fault_of(line)
    assert faults(Block("page.md", 1, "sh", line)) != []


def test_what_is_neither_run_nor_explained_is_found() -> None:
    for block in (
        Block("page.md", 1, "bash", "ls"),
        Block("page.md", 1, "python", "print("),
        Block("page.md", 1, "sh", "python scripts/no_such.py"),
        Block("page.md", 1, "sh", "make no-such-target"),
        Block("page.md", 1, "sh", "nf4 status", "not run", ""),
    ):
        assert faults(block) != []


def test_the_blocks_run(tiny_falcon: Path, quick_recipe: Path, tmp_path: Path) -> None:
    """In one process, pages in the order in which one needs what another published."""
    order(tmp_path / "order.json", tiny_falcon, quick_recipe)
    with HubServer() as hub:
        serve(hub, tiny_falcon, tmp_path)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.support.doc_runner", "order.json"],
            cwd=tmp_path,
            env=isolated(tmp_path / "home", hub.url, **VARIABLES),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()
    ]
    assert len(results) > 60
    assert [
        (r["block"]["page"], r["block"]["line"], r["fault"]) for r in results if r["fault"]
    ] == []
