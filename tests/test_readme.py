"""What the README names is there. Its Python runs with that of the documents (tests/docs)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from nf4_pipeline.cli import COMMANDS

ROOT: Final = Path(__file__).parents[1]
README: Final = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_its_commands_and_targets_are_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) >= 3
    for line in lines:
        program, name, *_ = line.split()
        assert name in (targets if program == "make" else COMMANDS), line
    assert set(re.findall(r"^\| `nf4 ([a-z]+)", README, re.MULTILINE)) == set(COMMANDS)


def test_what_it_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
