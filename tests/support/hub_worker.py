"""A process that downloads and pushes for tests, one order after the other, as a user would.

The client reads HF_HOME, HF_ENDPOINT and HF_TOKEN once, so whoever needs others starts another
worker. Orders go in and outcomes come out as lines of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

from tests.support import warm
from tests.support.hub_client import ROOT, isolated
from tests.support.tiny import Done


@dataclass(frozen=True)
class Outcome:
    """What came of an order: the facts of a push or {path: sha256} of a download, or an error."""

    error: str  # the class of the error, "" if there was none
    message: str
    value: dict[str, Any]
    sleeps: list[float]


class Worker:
    """A running process; a context manager that ends it."""

    def __init__(self, home: Path, endpoint: str, **variables: str) -> None:
        self.log = home.with_name(f"{home.name}.log")
        self._stderr = self.log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.hub_worker"],
            env=warm.variables(isolated(home, endpoint, **variables)),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def push(self, build: Path, repo_id: str, *, waits: bool = False, **options: Any) -> Outcome:
        """Pushes the export of a build.

        Args:
            build: its folder.
            repo_id: where to.
            waits: between tries, for a Hub that is at work meanwhile; else it asks again at once.
            options: the others of `hub.Target`, and `allow_unverified`.
        """
        order = {"do": "push", "build": str(build), "repo_id": repo_id, "waits": waits}
        return self._do(order | options)

    def download(self, repo_id: str, revision: str | None = None) -> Outcome:
        """Looks a model up and fetches every file of it."""
        return self._do({"do": "download", "repo_id": repo_id, "revision": revision})

    def publish(
        self,
        files: Path,
        repo_id: str,
        *,
        variables: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Outcome:
        """Publishes the files of a folder, with `variables` in the environment meanwhile."""
        order = {"do": "publish", "files": str(files), "repo_id": repo_id, "options": options}
        return self._do(order | {"variables": dict(variables or {})})

    def nf4(
        self, folder: Path, *args: str | Path, with_readers: bool = True, cluster: str = ""
    ) -> Done:
        """Runs `nf4 ARGS` in a folder, workers in the same process.

        Args:
            folder: the working folder.
            args: of the command.
            with_readers: whether verify has others read the export, too.
            cluster: for --engine ray, what its machines see of ours: "everything", or a function of
                `stand_in_cluster`.
        """
        order = {"do": "nf4", "folder": str(folder), "args": [str(arg) for arg in args]}
        options = {"with_readers": with_readers, "cluster": cluster}
        return Done(**self._do(order | options).value)

    def _do(self, order: Mapping[str, Any]) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self.log.read_text()
        return Outcome(**json.loads(line))


def _push(order: Mapping[str, Any], sleeps: list[float]) -> dict[str, Any]:
    from nf4_pipeline import hub
    from nf4_pipeline.build_folder import Build
    from nf4_pipeline.progress import SILENT
    from nf4_pipeline.stages.push import Push

    own = ("do", "build", "waits", "allow_unverified")
    target = hub.Target(**{name: value for name, value in order.items() if name not in own})
    unverified = order.get("allow_unverified", False)
    push = Push(Build(Path(order["build"])), target, SILENT, unverified)
    if order["waits"]:
        return push.run().facts.to_json()
    with mock.patch.object(hub, "publish", partial(hub.publish, sleep=sleeps.append)):
        return push.run().facts.to_json()


def _publish(order: Mapping[str, Any], sleeps: list[float]) -> dict[str, Any]:
    from nf4_pipeline import hub
    from nf4_pipeline.checkpoint.digest import digest_file
    from nf4_pipeline.progress import SILENT

    files = {}
    for path in Path(order["files"]).iterdir():
        digest = digest_file(path)
        files[path.name] = hub.LocalFile(path, digest.size, digest.sha256, None)
    target = hub.Target(order["repo_id"], **order["options"])
    message = hub.CommitMessage("NF4 artifact of tests")
    with mock.patch.dict(os.environ, order["variables"]):
        made = hub.publish(files, target, message, SILENT, sleep=sleeps.append)
    return {"commit": made.commit, "branch": made.branch, "committed": made.parent is not None}


def _download(order: Mapping[str, Any], sleeps: list[float]) -> dict[str, Any]:
    from nf4_pipeline import hub
    from nf4_pipeline.progress import SILENT

    model = hub.resolve(order["repo_id"], order["revision"], sleep=sleeps.append)
    fetched = hub.fetch(model, model.files, SILENT, sleep=sleeps.append)
    return {"commit": model.commit, "sha256": fetched.sha256}


def _nf4(order: Mapping[str, Any]) -> dict[str, Any]:
    from tests.support.command_line import run_nf4

    os.chdir(order["folder"])
    if order["cluster"]:
        from tests.support import stand_in_cluster

        with stand_in_cluster.standing_in(getattr(stand_in_cluster, order["cluster"])):
            return asdict(run_nf4(*order["args"]))
    if order["with_readers"]:
        return asdict(run_nf4(*order["args"]))
    from nf4_pipeline.stages import verify

    from tests.support.verified import NoReaders

    with mock.patch.object(verify, "Readers", NoReaders):
        return asdict(run_nf4(*order["args"]))


def _main() -> None:
    from nf4_pipeline.errors import PipelineError
    from nf4_pipeline.hub import xet

    if os.environ.get("TESTS_XET_STORE") == "folder":  # which no Hub may name
        xet.SCHEMES.append("local")
    for line in sys.stdin:
        order, sleeps = json.loads(line), list[float]()
        outcome: dict[str, Any] = {"error": "", "message": "", "value": {}}
        try:
            if order["do"] == "push":
                outcome["value"] = _push(order, sleeps)
            elif order["do"] == "publish":
                outcome["value"] = _publish(order, sleeps)
            elif order["do"] == "nf4":
                outcome["value"] = _nf4(order)
            else:
                outcome["value"] = _download(order, sleeps)
        except PipelineError as error:
            outcome |= {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(outcome | {"sleeps": sleeps}), flush=True)


if __name__ == "__main__":
    _main()
