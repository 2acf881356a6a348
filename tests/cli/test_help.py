"""Help pages: two examples each that can be typed, and no option that does nothing there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Final

import click
import pytest
from nf4_pipeline import __version__
from nf4_pipeline.cli import COMMANDS, cli
from nf4_pipeline.cli.help import CommandWithExamples

from tests.support.command_line import run_nf4

SHAPING: Final = {
    "quantize": {"--calibrate", "--extra-bytes", "--effort"},
    "serialize": {"--max-shard-size"},
    "verify": {"--prompts", "--eval-text", "--eval-tokens"},
}
TAKING: Final = {
    "quantize": {"--device", "--workers", "--memory-budget", "--engine", "--ray-address"},
    "serialize": set[str](),
    "verify": {"--device", "--require-gpu", "--device-memory", "--engine", "--ray-address"},
}
ALL: Final = {"--recipe"}.union(*SHAPING.values(), *TAKING.values())


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def options_of(name: str) -> set[str]:
    return {
        option
        for param in command(name).params
        if isinstance(param, click.Option)
        for option in param.opts
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_has_two_examples_that_can_be_typed(name: str) -> None:
    found = command(name)
    assert isinstance(found, CommandWithExamples)
    assert len(found.examples) >= 2
    page = run_nf4(name, "--help")
    assert page.status == 0
    assert page.out.index("Options:") < page.out.index("Examples:")
    for line, what in found.examples:
        assert f"  {line}\n" in page.out
        assert what.endswith(".")
        words = [word for word in shlex.split(line) if not re.match("[A-Z0-9_]+=", word)]
        assert words[:2] == ["nf4", name]
        with found.make_context(name, words[2:]):  # parsed, not run
            pass


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name: str) -> None:
    for param in command(name).params:
        assert not isinstance(param, click.Option) or param.help, param.name


@pytest.mark.parametrize("name", ["quantize", "serialize", "verify"])
def test_a_stage_has_its_own_options_and_no_others(name: str) -> None:
    assert options_of(name) & ALL == {"--recipe"} | SHAPING[name] | TAKING[name]


def test_build_has_those_of_all_its_stages() -> None:
    assert ALL <= options_of("build")


def test_what_runs_no_stage_has_none() -> None:
    assert options_of("attest") & ALL == set()
    assert options_of("status") & ALL == {"--recipe", "--device"}  # a verdict is one of a device


def ask(folder: Path, **variables: str) -> str:
    """What `nf4` gives a shell that asks it."""
    done = subprocess.run(
        [sys.executable, "-m", "nf4_pipeline"],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


def complete(shell: str, line: str, folder: Path) -> list[str]:
    """What a shell would offer for the last word of a line."""
    words = line.split(" ")
    at = words[-1] if shell == "fish" else str(len(words) - 1)
    asked = ask(folder, _NF4_COMPLETE=f"{shell}_complete", COMP_WORDS=line, COMP_CWORD=at)
    return re.findall(r"[\w./@-]+", asked)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, tmp_path: Path) -> None:
    (tmp_path / "sam-model").mkdir()
    assert {"serialize", "sign", "status"} <= set(complete(shell, "nf4 s", tmp_path))
    assert {"sample", "sam-model/"} <= set(complete(shell, "nf4 build sam", tmp_path))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_line_for_a_shell(shell: str, tmp_path: Path) -> None:
    assert f"_NF4_COMPLETE={shell}_source nf4" in run_nf4("--help").out
    assert "_NF4_COMPLETE" in ask(tmp_path, _NF4_COMPLETE=f"{shell}_source")


@pytest.mark.parametrize(
    ("name", "option", "said"),
    [
        ("build", "--calibarte", "Did you mean '--calibrate'?"),
        ("build", "--CALIBRATE", "Did you mean '--calibrate'?"),
        ("build", "--max-shard", "Did you mean '--max-shard-size'?"),
        ("push", "--privat", "Did you mean '--private'?"),
        ("build", "--bits", "always makes the 4-bit weights"),
        ("build", "--load_in_4bit", "always makes the 4-bit weights"),
        ("build", "--gpu", "Did you mean '--device cuda'?"),
        ("build", "--output-dir", "Did you mean '--build-dir'?"),
        ("build", "--overwrite", "Did you mean '--replace'?"),
        ("build", "--trust-remote-code", "is never run"),
        ("build", "--against", "It is one of `nf4 verify`. Leave it out here."),
        ("inspect", "--workers", "It is one of `nf4 build`, `nf4 quantize`, `nf4 reproduce`"),
        ("push", "--hf-token", "HF_TOKEN"),
        ("prompt", "--max-tokens", "Did you mean '--max-new-tokens'?"),
        ("build", "-x", "`nf4 build --help` lists"),
        ("build", "--skip-modules", "a key of a recipe, under [quantize]. Write it there"),
        ("verify", "--max_mean_kl", "a key of a recipe, under [verify]. Write it there"),
        ("inspect", "--skip-modules", "`nf4 inspect --help` lists"),
        ("build", "--shaping", "`nf4 build --help` lists"),
    ],
)
def test_an_option_that_there_is_not(name: str, option: str, said: str) -> None:
    done = run_nf4(name, "model", option)
    assert done.status == 2
    assert f"No such option '{option}'. " in done.err
    assert said in done.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("build model --calibrate", "It takes self|FILE. For example: --calibrate self"),
        ("build model --recipe", "It takes FILE."),
        ("build model --device", "For example: --device auto"),
        ("prompt model Hello --seed", "It takes a whole number. For example: --seed 1"),
        ("build model --json=1", "Option '--json' does not take a value."),
        ("build model --calibrate --device cpu", "--calibrate has no value: --device follows it."),
        ("build --calibrate --json", "--calibrate has no value: --json follows it."),
        ("build model --recipe --device cpu", "--recipe has no value: --device follows it."),
    ],
)
def test_an_option_without_its_value(line: str, said: str) -> None:
    done = run_nf4(*line.split())
    assert done.status == 2
    assert said in done.err


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_the_version(option: str) -> None:
    done = run_nf4(option)
    assert (done.status, done.out) == (0, f"nf4, version {__version__}\n")


@pytest.mark.parametrize("option", ["--calibrate", "--prompts", "--eval-text", "--recipe"])
def test_the_home_folder_in_a_path(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `--recipe=~/my.toml`, which a shell leaves as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path}/none cannot be read" in run_nf4("build", "sample", f"{option}=~/none").err
