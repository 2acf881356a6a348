"""Runs `nf4_pipeline.hub` as a user's process would: a new interpreter with its own environment.

The client reads HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE when it is imported, so each run is one
process. Nothing of the caller's HF settings, tokens, proxies or cache reaches it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from nf4_pipeline.progress import SilentReporter

from tests.support import warm

ROOT = Path(__file__).parents[2]

PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "pipeline")])
"""For processes that import this tree and its tests."""

_FOREIGN = (
    *("HF_", "HUGGING", "TRANSFORMERS_", "XDG_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
    *("GITHUB_", "ACTIONS_", "GITLAB_", "CI_", "SIGSTORE_"),  # of the CI that runs the tests
)


def isolated(home: Path, endpoint: str, **variables: str) -> dict[str, str]:
    """An environment whose Hub is `endpoint` and whose cache is `home`."""
    own = warm.without(os.environ)
    kept = {k: v for k, v in own.items() if not k.upper().startswith(_FOREIGN)}
    return kept | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": PYTHONPATH,
        **variables,
    }


@dataclass(frozen=True)
class Run:
    """What came of it: either the model and what was fetched of it, or an error."""

    text: str  # all that was printed
    error: str  # the class of the error, "" if there was none
    message: str
    commit: str
    offline: bool
    listed: dict[str, list[Any]]  # path → size, sha256, git_sha1
    folder: Path
    sha256: dict[str, str]
    sleeps: list[float]
    notes: list[str]
    tasks: dict[str, list[int]]  # title → total, sum of what was reported


def run(
    home: Path,
    endpoint: str,
    repo: str,
    *,
    revision: str | None = None,
    offline: bool | None = None,
    fetch: bool = True,
    free: int | None = None,
    env: dict[str, str] | None = None,
) -> Run:
    """Looks up a model and, with `fetch`, gets its files; `free` bytes seem to be on the disk."""
    order = {
        "repo": repo,
        "revision": revision,
        "offline": offline,
        "fetch": fetch,
        "free": free,
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.support.hub_client", json.dumps(order)],
        env=isolated(home, endpoint, **(env or {})),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "the client's own words reached the terminal"
    found = json.loads(done.stdout)
    folder = Path(found.pop("folder"))
    return Run(text=done.stdout, folder=folder, **found)


class _Recorder(SilentReporter):
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tasks: dict[str, list[int | None]] = {}

    @contextmanager
    def task(self, title: str, total: int | None, *, unit: str = "bytes") -> Iterator[Any]:
        amounts: list[int] = []
        try:
            yield SimpleNamespace(advance=amounts.append)
        finally:
            assert all(amount >= 0 for amount in amounts)
            self.tasks[title] = [total, sum(amounts)]

    def note(self, text: str) -> None:
        self.notes.append(text)


def _main(order: dict[str, Any]) -> dict[str, Any]:
    from nf4_pipeline import hub
    from nf4_pipeline.errors import PipelineError

    assert "huggingface_hub" not in sys.modules, "importing nf4_pipeline.hub must stay cheap"
    reporter, sleeps = _Recorder(), list[float]()
    found: dict[str, Any] = {"error": "", "message": "", "commit": "", "offline": False}
    found |= {"listed": {}, "folder": "", "sha256": {}}
    usage = SimpleNamespace(free=order["free"])
    disk = mock.patch("shutil.disk_usage", return_value=usage)
    try:
        model = hub.resolve(
            order["repo"], order["revision"], offline=order["offline"], sleep=sleeps.append
        )
        found |= {"commit": model.commit, "offline": model.offline}
        found["listed"] = {f.path: [f.size, f.sha256, f.git_sha1] for f in model.files}
        if order["fetch"]:
            if order["free"] is not None:
                disk.start()
            fetched = hub.fetch(model, hub.wanted_files(model), reporter, sleep=sleeps.append)
            found |= {"folder": str(fetched.folder), "sha256": fetched.sha256}
    except PipelineError as error:
        found |= {"error": type(error).__name__, "message": str(error)}
    return found | {"sleeps": sleeps, "notes": reporter.notes, "tasks": reporter.tasks}


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(sys.argv[1]))))
