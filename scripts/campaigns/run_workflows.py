"""Runs the workflows as a CI would, on this machine: environments are made, nothing is preset.

    python scripts/campaigns/run_workflows.py FOLDER

The project's own job that uses the action, twice, so that the second finds the first one's caches;
the reusable workflow on the sample, in two parts, up to a Hub on this machine; then with thresholds
that the sample fails, which must publish nothing; the same by the component for GitLab. FOLDER must
be new, and takes some 20 GB. The result is in docs/ci.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.support import hub_uploads  # noqa: E402
from tests.support.gitlab_runner import run_component  # noqa: E402
from tests.support.hub_server import TOKEN, HubServer  # noqa: E402
from tests.support.workflow_runner import JobResult, Platform  # noqa: E402

assert hub_uploads  # its routes are registered by importing it

_PUBLISH = ".github/workflows/build-and-publish.yml"
_FOREIGN = ("HF_", "PYTHON", "VIRTUAL_ENV", "GITHUB_", "NF4_", "NUMBA_")


def main() -> None:
    """Runs all of them, and says what each took."""
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir()
    (folder / "caller").mkdir()
    key = folder / "key.pem"
    command = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out"]
    subprocess.run([*command, key], check=True)
    with HubServer() as hub:
        hub.store.users[TOKEN] = "me"
        environment = {
            **{name: text for name, text in os.environ.items() if not name.startswith(_FOREIGN)},
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
        }
        platform = Platform(
            folder / "github",
            ROOT,
            folder / "caller",
            python=sys.executable,
            environment=environment,
            action_inputs={"torch-index": ""},
        )
        for turn in ("first", "second"):
            with _timed(f"ci.yml: action, {turn} run"):
                _check(platform.run(".github/workflows/ci.yml", only="action"))
            (folder / "github" / "jobs" / "action").rename(folder / f"action-{turn}")
            _forget_artifacts(platform)
        with _timed("build-and-publish.yml: sample in two parts"):
            inputs: dict[str, Any] = {"model": "sample", "repo": "me/sample", "parts": 2}
            inputs["torch-index"] = ""
            jobs = platform.run(_PUBLISH, inputs, {"signing-key": key.read_text()})
            _check(jobs)
        print(
            f"  {len(platform.attested)} files attested; hub: {hub.store.repos['me/sample'].refs}"
        )
        _forget_artifacts(platform)
        for job in (folder / "github" / "jobs").iterdir():
            job.rename(folder / f"published-{job.name}")
        with _timed("build-and-publish.yml: thresholds that the sample fails"):
            (folder / "caller" / "recipe.toml").write_text("[verify]\nmax_mean_kl = 1e-9\n")
            inputs |= {"recipe": "recipe.toml", "repo": "me/never", "parts": 1}
            jobs = platform.run(_PUBLISH, inputs)
            titles = [command.properties["title"] for command in jobs["build"].commands]
            assert jobs["build"].outputs["verdict"] == "fail", jobs["build"].log
            assert titles == ["nf4: mean KL from the 16-bit model"], titles
            assert jobs["push"].result == "skipped"
            assert "me/never" not in hub.store.repos
        with _timed("templates/build-and-publish.yml: sample in two parts"):
            done = run_component(
                ROOT / "templates" / "build-and-publish.yml",
                {
                    "model": "sample",
                    "repo": "me/sample-gitlab",
                    "parts": 2,
                    "package": f"{ROOT}[sign]",
                    "constraints": str(ROOT / "constraints.txt"),
                    "torch-index": "",
                },
                folder / "gitlab",
                platform.environment | {"NF4_SIGNING_KEY": str(key)},
            )
        for name, seconds in done.items():
            print(f"  {name:<12} {seconds:6.1f} s")
        print(f"  hub: {hub.store.repos['me/sample-gitlab'].refs}")


def _forget_artifacts(platform: Platform) -> None:
    """Another run has artifacts of its own."""
    for number, path in enumerate(sorted((platform.folder / "artifacts").iterdir())):
        path.rename(platform.folder / f"earlier-{time.monotonic_ns()}-{number}")


def _check(jobs: dict[str, JobResult]) -> None:
    for name, job in jobs.items():
        runs = sum(step.log != "" for step in job.steps)
        print(f"  {name:<8} {job.result}, {len(job.steps)} steps, {runs} with a log")
        if job.result != "success":
            sys.exit(job.log)


@contextmanager
def _timed(what: str) -> Iterator[None]:
    began = time.monotonic()
    print(what, flush=True)
    yield
    print(f"  {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
