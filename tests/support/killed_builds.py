"""A process that builds in forks of itself, each killed by SIGKILL at a chosen change on the disk.

    python -m tests.support.killed_builds        requests and replies are JSON, one a line

A fork costs little: the libraries are imported once. What it changes on the disk is counted (a file
opened to be written, a rename, a link, a deletion, a folder); at the chosen one it dies before the
system hears of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nf4_pipeline.job import run_download, run_stage
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe, parse_recipe
from nf4_pipeline.stages.download_request import DownloadRequest

from tests.support.jobs import CPU

_CHANGES = {"os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir"}


class KilledBuilds:
    """The process, from outside."""

    def __init__(self, process: subprocess.Popen[str], model: Path) -> None:
        self._process = process
        self._model = model

    def build(
        self, artifacts: Path, recipe: Mapping[str, Any], kill_at: int = 0, url: str = ""
    ) -> tuple[int, int]:
        """Downloads, quantizes and serializes; returns how it ended, and how many changes it made.

        Args:
            artifacts: the folder that holds builds.
            recipe: its tables.
            kill_at: the number of the change at which it dies, from 1; 0 for none.
            url: where the build is kept, a folder here (file://…); its changes count, too.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = [str(self._model), str(artifacts), dict(recipe), kill_at, url]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status, changes = json.loads(self._process.stdout.readline())
        return int(status), int(changes)


@contextmanager
def killed_builds(model: Path) -> Iterator[KilledBuilds]:
    """Starts the process for builds of one model, and ends it."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.support.killed_builds"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        cwd=Path(__file__).parents[2],
    ) as process:
        try:
            yield KilledBuilds(process, model)
        finally:
            process.kill()


def _build(model: str, artifacts: Path, recipe: Recipe, url: str) -> None:
    with in_process():
        place = artifacts / "copy" if url else None
        request = DownloadRequest(model, artifacts, recipe=recipe, build_dir=place, url=url or None)
        build, *_ = run_download(request, SILENT)
        for stage in ("quantize", "serialize"):
            run_stage(build, stage, recipe, CPU, SILENT)


def _in_fork(
    model: str, artifacts: str, tables: dict[str, Any], kill_at: int, url: str
) -> tuple[int, int]:
    places = [artifacts, *filter(None, [url.removeprefix("file://")])]
    told, says = os.pipe()
    pid = os.fork()
    if pid == 0:
        changes = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal changes
            writes = event == "open" and isinstance(args[2], int) and args[2] & os.O_ACCMODE
            if not (event in _CHANGES or writes) or not any(p in str(args) for p in places):
                return
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        status = 1
        try:
            _build(model, Path(artifacts), parse_recipe(tables, "request"), url)
            status = 0
        finally:
            os.write(says, str(changes).encode())
            os._exit(status)
    os.close(says)
    with os.fdopen(told, "rb") as pipe:
        changes = int(pipe.read() or kill_at)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), changes


def main() -> None:
    """Answers one request a line."""
    import torch  # noqa: F401
    import transformers.models.falcon.modeling_falcon  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_in_fork(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
