"""Runs a workflow of GitHub Actions here: every `run:` step for real, in its order.

Each job has a workspace and a temporary folder of its own, as on a machine of its own. Of actions,
this repository's own are run step by step; the few of GitHub's that are used are imitated: they
copy folders. Anything that is not known, an action, an input of one, an expression, ends the run.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from tests.support.workflow_commands import WorkflowCommand, obeyed
from tests.support.workflow_expressions import as_text, fill_in, holds

SHA: Final = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY: Final = "owner/nf4-pipeline"

_INPUTS: Final = {
    "actions/checkout": {"repository", "ref", "path", "persist-credentials", "fetch-depth"},
    "actions/setup-python": {"python-version", "update-environment"},
    "actions/cache": {"path", "key", "restore-keys"},
    "actions/upload-artifact": {
        *("name", "path", "if-no-files-found", "retention-days", "compression-level"),
    },
    "actions/download-artifact": {"name", "path", "pattern", "merge-multiple"},
    "actions/attest": {"subject-checksums"},
}
"""What is known of each action that is imitated, from its action.yml."""


class WorkflowError(AssertionError):
    """A workflow cannot be run as it is written."""


@dataclass
class StepResult:
    """What came of a step."""

    name: str
    outcome: str = "skipped"
    outputs: dict[str, str] = field(default_factory=dict)
    log: str = ""

    def context(self) -> dict[str, Any]:
        return {"outputs": self.outputs, "outcome": self.outcome, "conclusion": self.outcome}


@dataclass
class JobResult:
    """What came of a job, or of all jobs of a matrix: the last one's outputs."""

    result: str = "skipped"
    outputs: dict[str, str] = field(default_factory=dict)
    steps: list[StepResult] = field(default_factory=list)
    summary: str = ""

    @property
    def log(self) -> str:
        return "".join(f"--- {step.name}: {step.outcome}\n{step.log}" for step in self.steps)

    @property
    def commands(self) -> list[WorkflowCommand]:
        """What GitHub obeyed in its log, step by step."""
        return [command for step in self.steps for command in obeyed(step.log.splitlines())]


@dataclass
class Platform:
    """What outlives a job: caches, artifacts of the run, attestations.

    Attributes:
        folder: where all of it lies.
        tree: the repository whose workflows and actions are run.
        caller: the repository that a checkout gives.
        python: the interpreter that setup-python finds.
        environment: of every step.
        variables: the repository's, as `vars`.
        event: what the run is started by.
        action_inputs: of this repository's own action, where a workflow gives none.
        identity: what the environment has of jobs that may say who they are.
        attested: name -> sha256 of what was attested.
    """

    folder: Path
    tree: Path
    caller: Path
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    event: str = "push"
    action_inputs: Mapping[str, str] = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)
    attested: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("caches", "artifacts", "jobs"):
            (self.folder / name).mkdir(parents=True)

    def artifact(self, name: str) -> Path:
        """What a job handed on."""
        return self.folder / "artifacts" / name

    def run(
        self,
        workflow: str,
        inputs: Mapping[str, Any] | None = None,
        secrets: Mapping[str, str] | None = None,
        *,
        only: str | None = None,
    ) -> dict[str, JobResult]:
        """Runs a workflow's jobs in the order of their needs.

        Args:
            workflow: its path in the tree.
            inputs: as a caller gives them; what is not declared, and what is required and missing,
                is refused.
            secrets: likewise.
            only: the one job to run; None for all.

        Returns:
            What came of each job, by its id.
        """
        document = yaml.safe_load((self.tree / workflow).read_text("utf-8"))
        triggers = document[True]  # YAML reads `on` as a truth value
        call = (triggers.get("workflow_call") or {}) if isinstance(triggers, dict) else {}
        given = _checked_inputs(call.get("inputs") or {}, inputs or {}, workflow)
        for name in secrets or {}:
            if name not in (call.get("secrets") or {}):
                raise WorkflowError(f"{workflow} declares no secret {name}")
        results: dict[str, JobResult] = {}
        waiting = {name: job for name, job in document["jobs"].items() if only in (None, name)}
        while waiting:
            ready = [name for name, job in waiting.items() if not set(_needs(job)) & set(waiting)]
            if not ready:
                raise WorkflowError(f"jobs wait for each other: {sorted(waiting)}")
            for name in ready:
                contexts = self._contexts() | {"inputs": given, "secrets": dict(secrets or {})}
                results[name] = self._job(name, waiting.pop(name), results, contexts)
        return results

    def _contexts(self) -> dict[str, Any]:
        return {
            "github": {
                "repository": REPOSITORY,
                "run_id": "1",
                "workflow": "Test",
                "ref": "refs/heads/main",
                "event_name": self.event,
                "sha": SHA,
            },
            "job": {"workflow_repository": REPOSITORY, "workflow_sha": SHA},
            "runner": {"os": "Linux", "arch": "X64"},
            "vars": dict(self.variables),
            "env": {},
        }

    def _job(
        self,
        name: str,
        job: Mapping[str, Any],
        results: Mapping[str, JobResult],
        contexts: dict[str, Any],
    ) -> JobResult:
        needs = {need: results[need] for need in _needs(job)}
        contexts = contexts | {
            "needs": {
                need: {"result": done.result, "outputs": done.outputs}
                for need, done in needs.items()
            },
            **_status(all(done.result == "success" for done in needs.values())),
        }
        if not holds(job.get("if"), contexts):
            return JobResult()
        if "uses" in job:
            return self._called(job, contexts)
        matrix = fill_in((job.get("strategy") or {}).get("matrix") or {}, contexts)

        def run_one(values: tuple[Any, ...]) -> JobResult:
            chosen = dict(zip(matrix, values, strict=True))
            suffix = "".join(f"-{as_text(value)}" for value in values)
            return _Job(self, f"{name}{suffix}", contexts | {"matrix": chosen}).run(job)

        done = JobResult("success")
        with ThreadPoolExecutor() as pool:
            all_of_them = list(pool.map(run_one, itertools.product(*matrix.values())))
        for one in all_of_them:
            done.result = one.result if done.result == "success" else done.result
            done.outputs = one.outputs
            done.steps += one.steps
            done.summary += one.summary
        return done

    def _called(self, job: Mapping[str, Any], contexts: dict[str, Any]) -> JobResult:
        """A job that is a reusable workflow of this tree."""
        called = str(job["uses"])
        if not called.startswith("$/"):
            raise WorkflowError(f"{called} is not of this repository")
        inner = self.run(
            called.removeprefix("$/"),
            fill_in(job.get("with") or {}, contexts),
            fill_in(job.get("secrets") or {}, contexts),
        )
        failed = any(done.result == "failure" for done in inner.values())
        return JobResult("failure" if failed else "success")


class _Job:
    """One job on a machine of its own."""

    def __init__(self, platform: Platform, name: str, contexts: dict[str, Any]) -> None:
        self.platform = platform
        self.root = platform.folder / "jobs" / name
        if (self.root / "work" / "_temp").exists():
            raise WorkflowError(f"two jobs are called {name}")
        self.workspace, self.temp = self.root / "work" / "caller", self.root / "work" / "_temp"
        self.workspace.mkdir(parents=True, exist_ok=True)
        self.temp.mkdir()
        self.actions = self.root / "work" / "_actions" / REPOSITORY / SHA
        self.contexts = contexts
        contexts["runner"] = contexts["runner"] | {"temp": str(self.temp)}
        self.done = JobResult("success")
        self.to_save: list[tuple[Path, list[str]]] = []
        self.numbers = itertools.count()

    def run(self, job: Mapping[str, Any]) -> JobResult:
        environment = _texts(fill_in(job.get("env") or {}, self.contexts))
        if job.get("permissions", {}).get("id-token") == "write":
            environment |= self.platform.identity
        failed, steps = self._steps(job["steps"], self.contexts, environment, "", None)
        if failed:
            self.done.result = "failure"
        else:
            for place, paths in self.to_save:
                _copy(paths, place)
        contexts = self.contexts | {"steps": steps}
        self.done.outputs = _texts(fill_in(job.get("outputs") or {}, contexts))
        return self.done

    def _steps(
        self,
        steps: list[Mapping[str, Any]],
        contexts: Mapping[str, Any],
        environment: Mapping[str, str],
        prefix: str,
        action: Path | None,
    ) -> tuple[bool, dict[str, Any]]:
        """Runs steps in turn; returns whether one failed, and the context `steps`."""
        known: dict[str, Any] = {
            str(step["id"]): StepResult(str(step["id"])).context() for step in steps if "id" in step
        }
        failed = False
        for step in steps:
            here = dict(contexts) | {"steps": known} | _status(not failed)
            title = fill_in(step.get("name") or step.get("uses") or step["run"], here)
            result = StepResult(f"{prefix}{title}")
            if holds(step.get("if"), here):
                own = dict(environment) | _texts(fill_in(step.get("env") or {}, here))
                if "run" in step:
                    self._run(step, result, own, action)
                else:
                    self._use(step, result, own, here)
            self.done.steps.append(result)
            failed = failed or result.outcome == "failure"
            if "id" in step:
                known[str(step["id"])] = result.context()
        return failed, known

    def _run(
        self,
        step: Mapping[str, Any],
        result: StepResult,
        environment: Mapping[str, str],
        action: Path | None,
    ) -> None:
        """A `run:` step, as the runner starts it, but that no expression may stand in it."""
        if "${{" in step["run"]:
            raise WorkflowError(f"{result.name} pastes an expression into its script")
        script = self.temp / f"step-{next(self.numbers)}.sh"
        script.write_text(step["run"], "utf-8")
        shell = ["bash", "-e"]
        if step.get("shell") == "bash":
            shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail"]
        elif action is not None or "shell" in step:
            raise WorkflowError(f"{result.name} has no shell that is known")
        files = {
            name: self.temp / f"{script.stem}-{name.lower()}"
            for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_ENV", "GITHUB_PATH")
        }
        for file in files.values():
            file.touch()
        done = subprocess.run(
            [*shell, str(script)],
            cwd=self.workspace,
            env={
                **self.platform.environment,
                "CI": "true",
                "GITHUB_ACTIONS": "true",
                "GITHUB_WORKSPACE": str(self.workspace),
                "RUNNER_TEMP": str(self.temp),
                **({} if action is None else {"GITHUB_ACTION_PATH": str(action)}),
                **{name: str(file) for name, file in files.items()},
                **environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=3600,
            check=False,
        )
        result.log = done.stdout
        result.outcome = "success" if done.returncode == 0 else "failure"
        result.outputs = read_outputs(files["GITHUB_OUTPUT"].read_text("utf-8"))
        self.done.summary += files["GITHUB_STEP_SUMMARY"].read_text("utf-8")
        for name in ("GITHUB_ENV", "GITHUB_PATH"):
            if files[name].read_bytes():
                raise WorkflowError(f"{result.name} writes {name}, which nothing here needs")

    def _use(
        self,
        step: Mapping[str, Any],
        result: StepResult,
        environment: Mapping[str, str],
        contexts: Mapping[str, Any],
    ) -> None:
        used = str(step["uses"])
        given = fill_in(step.get("with") or {}, contexts)
        if used.startswith("$/"):
            self._use_own(used.removeprefix("$/"), given, result, environment, contexts)
            return
        name, _, pin = used.partition("@")
        if not re.fullmatch(r"[0-9a-f]{40}", pin):
            raise WorkflowError(f"{used} is not pinned")
        if name not in _INPUTS:
            raise WorkflowError(f"nothing is known of {name}")
        if unknown := set(given) - _INPUTS[name]:
            raise WorkflowError(f"{name} has no input {sorted(unknown)}")
        with_ = _texts(given)
        try:
            getattr(self, "_" + name.partition("/")[2].replace("-", "_"))(with_, result)
            result.outcome = "success"
        except FileNotFoundError as error:
            result.outcome, result.log = "failure", f"{error}\n"

    def _use_own(
        self,
        path: str,
        given: Mapping[str, Any],
        result: StepResult,
        environment: Mapping[str, str],
        contexts: Mapping[str, Any],
    ) -> None:
        """A composite action of this tree, from the copy that a runner would have fetched."""
        if not self.actions.exists():
            copy_tracked(self.platform.tree, self.actions)
        folder = self.actions / path
        document = yaml.safe_load((folder / "action.yml").read_text("utf-8"))
        assert document["runs"]["using"] == "composite"
        inputs = _checked_inputs(document["inputs"], {**self.platform.action_inputs, **given}, path)
        inner = {
            name: contexts[name] for name in ("github", "runner", "job", "env") if name in contexts
        } | {"inputs": _texts(inputs)}
        failed, steps = self._steps(
            document["runs"]["steps"], inner, environment, f"{result.name} / ", folder
        )
        result.outcome = "failure" if failed else "success"
        outputs = {name: output["value"] for name, output in document["outputs"].items()}
        result.outputs = _texts(fill_in(outputs, inner | {"steps": steps}))

    def _checkout(self, given: Mapping[str, str], result: StepResult) -> None:
        if given.get("persist-credentials") != "false":
            raise WorkflowError("a checkout leaves its token behind")
        shutil.copytree(
            self.platform.caller,
            self.workspace / given.get("path", "."),
            dirs_exist_ok=True,
            symlinks=True,
        )

    def _setup_python(self, given: Mapping[str, str], result: StepResult) -> None:
        python = self.platform.python
        version = subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout
        result.outputs = {"python-path": python, "python-version": version.split()[1]}

    def _cache(self, given: Mapping[str, str], result: StepResult) -> None:
        """What a key of this name holds; else the newest that begins as restore-keys say."""
        if "," in given["key"] or len(given["key"]) > 512:
            raise WorkflowError(f"{given['key']} can be no key of a cache")
        caches = self.platform.folder / "caches"
        exact = caches / hashlib.sha256(given["key"].encode()).hexdigest()
        paths = given["path"].split("\n")
        result.outputs = {"cache-hit": as_text(exact.exists())}
        if exact.exists():
            _copy([str(exact / str(n)) for n in range(len(paths))], None, paths)
        else:
            self.to_save.append((exact, paths))

    def _upload_artifact(self, given: Mapping[str, str], result: StepResult) -> None:
        place = self.platform.artifact(given["name"])
        if place.exists():
            raise WorkflowError(f"two artifacts are called {given['name']}")
        listed = [line for line in given["path"].split("\n") if line.strip()]
        patterns = [str(self.workspace / line).removeprefix("/") for line in listed]
        found = [match for pattern in patterns for match in sorted(Path("/").glob(pattern))]
        if not found:
            if given.get("if-no-files-found") == "error":
                raise FileNotFoundError(f"nothing is there to upload: {listed}")
            return
        # What several paths have in common is left out of the names in the artifact.
        top = Path(
            os.path.commonpath([str(self.workspace / line.split("*")[0]) for line in listed])
        )
        top = top if top.is_dir() else top.parent
        for path in found:
            for file in [path] if path.is_file() else sorted(path.rglob("*")):
                if file.is_file():
                    target = place / file.relative_to(top)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, target)  # times and rights do not travel
        result.outputs = {
            "artifact-url": f"https://github.com/{REPOSITORY}/actions/runs/1/artifacts/7"
        }

    def _download_artifact(self, given: Mapping[str, str], result: StepResult) -> None:
        target = self.workspace / given.get("path", ".")
        artifacts = self.platform.folder / "artifacts"
        if "name" in given:
            names = [given["name"]]
        else:
            if given.get("merge-multiple") != "true":
                raise WorkflowError("each would get a folder of its own")
            names = sorted(path.name for path in artifacts.glob(given["pattern"]))
        for name in names:
            if not (artifacts / name).is_dir():
                raise FileNotFoundError(f"there is no artifact {name}")
            shutil.copytree(artifacts / name, target, dirs_exist_ok=True)

    def _attest(self, given: Mapping[str, str], result: StepResult) -> None:
        """Notes the subjects: what is signed by GitHub is a list of names and digests."""
        lines = (self.workspace / given["subject-checksums"]).read_text("utf-8").splitlines()
        if not 0 < len(lines) <= 1024:
            raise WorkflowError(f"{len(lines)} subjects")
        for line in lines:
            found = re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line)
            if found is None:
                raise WorkflowError(f"{line!r} is no line of sha256sum")
            self.platform.attested[found[2]] = found[1]


def read_outputs(text: str) -> dict[str, str]:
    """What a step wrote into GITHUB_OUTPUT, in both forms."""
    outputs, lines = {}, iter(text.split("\n"))
    for line in lines:
        if not line:
            continue
        equals, here = line.find("="), line.find("<<")
        if equals >= 0 and (here < 0 or equals < here):
            name, value = line[:equals], line[equals + 1 :]
        elif here >= 0:
            name, value = line[:here], "\n".join(_until(lines, line[here + 2 :]))
        else:
            raise WorkflowError(f"{line!r} is no output")
        outputs[name] = value
    return outputs


def _until(lines: Iterator[str], end: str) -> Iterator[str]:
    for line in lines:
        if line == end:
            return
        yield line
    raise WorkflowError(f"an output has no end: {end!r}")


def copy_tracked(tree: Path, target: Path) -> None:
    """A copy of what git has or would have of a tree, as a checkout gives it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=tree,
        capture_output=True,
        check=True,
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (tree / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree / name, target / name)
            shutil.copymode(tree / name, target / name)


def _copy(sources: list[str], place: Path | None, targets: list[str] | None = None) -> None:
    """Folders into a cache, by number; or out of it."""
    for number, source in enumerate(sources):
        target = Path(targets[number]) if targets is not None else (place or Path()) / str(number)
        if Path(source).is_dir():
            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)


def _needs(job: Mapping[str, Any]) -> list[str]:
    needs = job.get("needs") or []
    return [needs] if isinstance(needs, str) else list(needs)


def _status(good: bool) -> dict[str, Any]:
    return {
        "success": lambda: good,
        "failure": lambda: not good,
        "always": lambda: True,
        "cancelled": lambda: False,
    }


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: as_text(value) for name, value in values.items()}


def _checked_inputs(
    declared: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> dict[str, Any]:
    if unknown := set(given) - set(declared):
        raise WorkflowError(f"{where} has no input {sorted(unknown)}")
    for name, about in declared.items():
        if about.get("required") and name not in given:
            raise WorkflowError(f"{where} needs {name}")
    return {name: given.get(name, about.get("default")) for name, about in declared.items()}
