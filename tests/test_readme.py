"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from nf4_pipeline.cli import COMMANDS

from tests.support.tiny import environment

ROOT: Final = Path(__file__).parents[1]
README: Final = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_its_python_runs_in_one_session(tmp_path: Path) -> None:
    script = "\n".join(blocks("python"))
    assert script.count("nf4_pipeline.") >= 3
    done = subprocess.run(
        [sys.executable, "-c", f"{script}\nprint(type(model).__name__, artifact.verdict)"],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer, told = done.stdout.strip().rsplit("\n", 1)
    assert "fox" in answer
    assert told == "FalconForCausalLM pass"


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
