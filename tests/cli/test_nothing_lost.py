"""A command that is refused, or repeats a part, leaves what stood there; and lines to paste."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.cli.terminal import program
from nf4_pipeline.errors import ResourceError, UsageError
from nf4_pipeline.machine import check_device
from nf4_pipeline.records import ATTEST
from nf4_pipeline.runtime.generate import Sampling

from tests.support.command_line import run_nf4
from tests.support.tiny import content_of, copy_of

pytestmark = pytest.mark.usefixtures("warm_workers")


@pytest.fixture
def build(verified: Path, tmp_path: Path) -> Build:
    return Build(copy_of(verified, tmp_path / "build"))


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
@pytest.mark.parametrize("stage", ["verify", "quantize", "attest"])
def test_a_device_that_is_not_there_costs_nothing(
    build: Build, stage: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    before = content_of(build.export), content_of(build.root / "records")
    options = [] if stage == "attest" else ["--device", device]
    if stage == "attest":
        with pytest.raises(ResourceError, match=f"Device {device} was asked for"):
            check_device(device)
    else:
        done = run_nf4(stage, "--build-dir", build.root, *options)
        assert done.status == 1
        assert f"Device {device} was asked for, but this machine has 0 CUDA devices" in done.err
    assert (content_of(build.export), content_of(build.root / "records")) == before


def test_verify_leaves_the_card_that_was_there(build: Build, quick_recipe: Path) -> None:
    assert (build.export / "README.md").is_file()
    record = build.record(ATTEST)
    assert record is not None
    done = run_nf4("verify", "--build-dir", build.root, "--recipe", quick_recipe)
    assert done.status == 0, done.err
    again = build.record(ATTEST)
    assert again is not None
    assert again.facts.repo_id == record.facts.repo_id
    assert again.outputs.keys() == record.outputs.keys()
    state = run_nf4("status", "--build-dir", build.root, "--recipe", quick_recipe)
    assert "missing" not in state.out
    assert "stale" not in state.out


def test_an_artifact_is_not_compared_with_itself(build: Build) -> None:
    for name in (build.root, build.export):
        done = run_nf4("verify", "--build-dir", build.root, "--against", name)
        assert done.status == 2
        assert "is the build itself" in done.err
    assert build.record(ATTEST) is not None


def test_the_bare_command_shows_its_help() -> None:
    done = run_nf4()
    assert done.status == 2
    assert "\nCommands:\n" in done.err
    assert "\\n" not in done.err


@pytest.mark.parametrize(
    ("called", "on_path", "said"),
    [
        ("bin/nf4", False, "bin/nf4"),
        ("bin/nf4", True, "nf4"),
        ("/somewhere/__main__.py", False, "python -m nf4_pipeline"),
        ("my tools/nf4", False, "'my tools/nf4'"),
    ],
)
def test_lines_to_paste_begin_as_the_program_was_called(
    called: str, on_path: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("bin", "my tools", "empty"):
        (tmp_path / folder).mkdir()
    for path in ("bin/nf4", "my tools/nf4"):
        (tmp_path / path).write_text("#!/bin/sh\n")
        (tmp_path / path).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / ("bin" if on_path else "empty")))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / called) if called[0] != "/" else called])
    assert program() == said


@pytest.mark.parametrize(
    "values",
    [
        {"max_length": "x"},
        {"max_new_tokens": 1.5},
        {"top_k": True},
        {"num_return_sequences": None} | {"top_k": "5"},
        {"top_p": "0.9"},
        {"temperature": "hot"},
        {"seed": 1.0},
    ],
)
def test_values_of_another_kind_are_errors_of_ours(values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="expected a"):
        Sampling(**values)  # type: ignore[arg-type]
