"""The steps of .github/workflows/rebuild.yml that run something, in order, on this machine."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from nf4_pipeline.errors import NOT_CHECKED

from tests.support.hub_client import ROOT
from tests.support.tiny import copy_of, environment

WORKFLOW: Final = ROOT / ".github" / "workflows" / "rebuild.yml"


def step(job: str, name: str) -> str:
    """What a step runs."""
    jobs = yaml.safe_load(WORKFLOW.read_text("utf-8"))["jobs"]
    (found,) = [step for step in jobs[job]["steps"] if step.get("name") == name]
    run: str = found["run"]
    return run


def bash(
    run: str, cwd: Path, variables: Mapping[str, str | Path]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", run],
        cwd=cwd,
        env=environment(cwd) | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        check=False,
    )


def git(*args: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        ["git", *map(str, args)], cwd=cwd, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository whose origin is a bare one here, with the script in it."""
    git("init", "--quiet", "--bare", tmp_path / "origin.git", cwd=tmp_path)
    folder = tmp_path / "checkout"
    git("init", "--quiet", folder, cwd=tmp_path)
    git("remote", "add", "origin", tmp_path / "origin.git", cwd=folder)
    (folder / "scripts" / "ci").mkdir(parents=True)
    script = folder / "scripts" / "ci" / "publish_rebuilt.sh"
    script.write_bytes((ROOT / "scripts" / "ci" / "publish_rebuilt.sh").read_bytes())
    script.chmod(0o755)
    return folder


def test_the_steps_from_the_list_to_the_branch(checkout: Path, exported_falcon: Path) -> None:
    nf4 = checkout.parent / "nf4"
    command = f"{shlex.quote(sys.executable)} -m nf4_pipeline"
    nf4.write_text(f'#!/bin/sh\nexec {command} "$@"\n', "utf-8")
    nf4.chmod(0o755)
    copy_of(exported_falcon / "export", checkout / "tiny-nf4")
    (checkout / "list.txt").write_text("# ours\ntiny-nf4\n", "utf-8")
    variables: dict[str, str | Path] = {
        "NF4": nf4,
        "LIST": "list.txt",
        "VERIFIER": "https://github.com/us/ours/.github/workflows/rebuild.yml@refs/heads/main",
        "RUNNER_TEMP": checkout.parent / "temp",
        "GITHUB_STEP_SUMMARY": checkout.parent / "summary.md",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "pipeline"), str(ROOT)]),
    }
    done = bash(step("rebuild", "Rebuild"), checkout, variables)
    assert done.returncode == NOT_CHECKED, done.stderr  # made from a folder, which no Hub holds
    results: dict[str, Any] = json.loads((checkout / "rebuilt" / "results.json").read_text("utf-8"))
    assert results["verifier"] == variables["VERIFIER"]
    assert [result["verdict"] for result in results["results"]] == ["NOT_CHECKED"]
    assert not list(checkout.parent.glob("temp/nf4-rebuild"))
    assert bash(step("rebuild", "Show the table"), checkout, variables).returncode == 0
    assert "| tiny-nf4 |" in Path(variables["GITHUB_STEP_SUMMARY"]).read_text("utf-8")

    publish = step("publish", "Put them on the branch")
    variables |= {"RESULTS": checkout / "rebuilt", "GITHUB_TOKEN": "RecognizableToken"}
    origin = checkout.parent / "origin.git"
    for said in ("Published on the branch rebuilt.", "Nothing changed."):
        done = bash(publish, checkout, variables)
        assert (done.returncode, done.stdout) == (0, f"{said}\n"), done.stderr
        assert "RecognizableToken" not in done.stdout + done.stderr
    names = git("ls-tree", "-r", "--name-only", "rebuilt", cwd=origin).split()
    assert sorted(names) == sorted(path.name for path in (checkout / "rebuilt").iterdir())
    (checkout / "rebuilt" / "tiny-nf4.svg").unlink()
    assert bash(publish, checkout, variables).returncode == 0
    assert "tiny-nf4.svg" not in git("ls-tree", "-r", "--name-only", "rebuilt", cwd=origin)
    assert len(git("log", "--format=%s", "rebuilt", cwd=origin).splitlines()) == 2
    assert "RecognizableToken" not in git("log", "--format=%B%an%ae", "rebuilt", cwd=origin)


def test_nothing_is_published_without_results(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    publish = step("publish", "Put them on the branch")
    done = bash(publish, checkout, {"RESULTS": tmp_path / "empty"})
    assert done.returncode == 1
    assert "holds no results.json" in done.stderr


def test_rights_are_few_and_no_secret_is_named() -> None:
    text = WORKFLOW.read_text("utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {}
    assert workflow["jobs"]["rebuild"]["permissions"] == {"contents": "read"}
    assert "secrets." not in text
    uses = [s["uses"] for job in workflow["jobs"].values() for s in job["steps"] if "uses" in s]
    assert all(name == "$/." or len(name.partition("@")[2]) == 40 for name in uses)
