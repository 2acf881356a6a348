"""Runs a component of GitLab CI here: every script for real, in the order of the jobs' needs.

Each job has a clone of its own; artifacts and variables of the jobs that it needs are copied into
it, as a runner does. What is not known of a job ends the run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_INPUT = re.compile(r"\$\[\[\s*inputs\.([\w-]+)\s*\]\]")
_VARIABLE = re.compile(r"\$(\w+)")
_KNOWN = {
    *("stage", "image", "interruptible", "variables", "cache", "before_script", "needs", "timeout"),
    *("script", "after_script", "artifacts", "parallel", "rules", "id_tokens", "resource_group"),
    "extends",
}


def run_component(
    path: Path, inputs: Mapping[str, Any], folder: Path, environment: Mapping[str, str]
) -> dict[str, float]:
    """Runs its jobs.

    Args:
        path: of the component.
        inputs: as a pipeline gives them.
        folder: new; a clone for each job will be in it.
        environment: of every script.

    Returns:
        The seconds that each job took, by its name; those that a rule left out are missing.
    """
    header, document = yaml.safe_load_all(path.read_text("utf-8"))
    given = {}
    for name, about in header["spec"]["inputs"].items():
        assert name in inputs or "default" in about, f"{name} is missing"
        given[name] = inputs.get(name, about.get("default"))
    assert not set(inputs) - set(given), "unknown inputs"
    jobs = _put_in(document, given)
    took: dict[str, float] = {}
    for name, job in jobs.items():  # they stand in the order of their needs
        if name.startswith("."):
            continue
        job = _extended(job, jobs)
        assert set(job) <= _KNOWN, set(job) - _KNOWN
        if all(not _applies(rule["if"]) for rule in job.get("rules", [])) and "rules" in job:
            continue
        count = int(job.get("parallel", 1))
        began = time.monotonic()
        for index in range(1, count + 1):
            clone = folder / f"{name}-{index}"
            _run_job(job, clone, folder, index, count, environment)
        took[name] = time.monotonic() - began
    return took


def _run_job(
    job: Mapping[str, Any],
    clone: Path,
    folder: Path,
    index: int,
    count: int,
    environment: Mapping[str, str],
) -> None:
    clone.mkdir(parents=True)
    own = {"CI": "true", "GITLAB_CI": "true", "CI_PROJECT_DIR": str(clone)}
    own |= {"CI_NODE_INDEX": str(index), "CI_NODE_TOTAL": str(count)}
    for name, value in job["variables"].items():
        plain = isinstance(value, dict)
        text = str(value["value"] if plain else value)
        own[name] = text if plain else _VARIABLE.sub(lambda v: own.get(v[1], ""), text)
    for need in job["needs"]:
        wanted = need if isinstance(need, str) else need["job"]
        for earlier in sorted(folder.glob(f"{wanted}-[0-9]*")):
            shutil.copytree(earlier / ".handed-on", clone, dirs_exist_ok=True)
            own |= _variables(earlier / ".variables")
    scripts = ["\n".join([*job["before_script"], *job["script"]])]
    if "after_script" in job:
        scripts.append("\n".join(job["after_script"]))
    for script in scripts:
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", script],
            cwd=clone,
            env={**environment, **own},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
    artifacts = job["artifacts"]
    (clone / ".handed-on").mkdir()
    for pattern in artifacts["paths"]:
        found = sorted(clone.glob(pattern))
        assert found, f"no {pattern}"
        for path in found:
            target = clone / ".handed-on" / path.relative_to(clone)
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target)
    for kind, name in artifacts.get("reports", {}).items():
        assert (clone / name).is_file(), f"no {kind} {name}"
        if kind == "dotenv":
            shutil.copyfile(clone / name, clone / ".variables")


def _variables(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    return dict(line.split("=", 1) for line in path.read_text("utf-8").splitlines())


def _put_in(value: Any, inputs: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        return {key: _put_in(inner, inputs) for key, inner in value.items()}
    if isinstance(value, list):
        return [_put_in(inner, inputs) for inner in value]
    if not isinstance(value, str):
        return value
    if whole := _INPUT.fullmatch(value):
        return inputs[whole[1]]
    return _INPUT.sub(lambda found: str(inputs[found[1]]), value)


def _extended(job: Mapping[str, Any], jobs: Mapping[str, Any]) -> dict[str, Any]:
    """With what it extends; of variables both, of all else its own."""
    base = jobs[job["extends"]]
    both = {**base.get("variables", {}), **job.get("variables", {})}
    return {**base, **job, "variables": both}


def _applies(condition: str) -> bool:
    found = re.fullmatch(r'"([^"]*)" (==|!=) "([^"]*)"', condition)
    assert found, f"cannot judge {condition}"
    return (found[1] == found[3]) == (found[2] == "==")
