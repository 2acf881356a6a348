"""`hf nf4`: the Hub's own program installs the extension from a repo, and hands over to nf4."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest
from nf4_pipeline import __version__

from tests.support.github_server import GitHubServer

EXTENSION: Final = Path(__file__).parents[2] / "scripts" / "hf-nf4"
FILES: Final = {path.name: path.read_bytes() for path in EXTENSION.iterdir()}
HF: Final = Path(sys.executable).with_name("hf")
SECONDS: Final = 300


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Where `hf extensions install` found the repo, and put what it holds."""
    folder = tmp_path_factory.mktemp("extension")
    with GitHubServer(folder, {"some-org/hf-nf4": FILES}) as github:
        variables = {**github.environment, "HOME": str(folder), "NO_COLOR": "1"}
        variables["PATH"] = f"{HF.parent}:{variables['PATH']}"
        done = run(variables, HF, "extensions", "install", "some-org/hf-nf4")
        assert done.returncode == 0, done.stderr
        assert "GET raw.githubusercontent.com/some-org/hf-nf4/HEAD/hf-nf4" in github.requests
        yield variables


def run(environment: Mapping[str, str], *command: str | Path) -> subprocess.CompletedProcess[str]:
    """A command's end, and what it printed."""
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )


def test_hf_lists_it(environment: dict[str, str]) -> None:
    done = run(environment, HF, "extensions", "list")
    assert "hf nf4" in done.stdout
    assert "some-org/hf-nf4" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--version"], 0, f"nf4, version {__version__}\n"),
        (["inspect", "nowhere at all"], 1, "nowhere at all"),
        (["quantize", "--no-such-option"], 2, "--no-such-option"),
    ],
)
def test_arguments_and_exit_codes_pass_through(
    environment: dict[str, str], arguments: list[str], status: int, said: str
) -> None:
    done = run(environment, HF, "nf4", *arguments)
    assert (done.returncode, said in done.stdout + done.stderr) == (status, True), done


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (["nf4", "uvx", "pipx"], "nf4 build a model --json"),
        (["uvx", "pipx"], "uvx --from nf4-pipeline nf4 build a model --json"),
        (["pipx"], "pipx run --spec nf4-pipeline nf4 build a model --json"),
    ],
)
def test_an_installed_nf4_is_used_or_one_is_fetched(
    tmp_path: Path, present: list[str], expected: str
) -> None:
    for name in present:
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        program.chmod(0o755)
    done = run(
        {"PATH": str(tmp_path)}, "/bin/sh", EXTENSION / "hf-nf4", "build", "a model", "--json"
    )
    assert done.stdout == f"{expected}\n"


def test_without_any_it_says_what_to_install(tmp_path: Path) -> None:
    done = run({"PATH": str(tmp_path)}, "/bin/sh", EXTENSION / "hf-nf4", "build")
    assert done.returncode == 127
    assert "pip install nf4-pipeline" in done.stderr


def test_the_file_is_executable() -> None:
    assert shutil.which(str(EXTENSION / "hf-nf4"))
