"""The files of GitHub Actions and GitLab CI: what must hold of each, and of new ones."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

ROOT: Final = Path(__file__).parents[2]
WORKFLOWS: Final = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTIONS: Final = [ROOT / "action.yml"]
COMPONENTS: Final = sorted((ROOT / "templates").glob("*.yml"))
DOCS: Final = (ROOT / "docs" / "ci.md").read_text("utf-8")
SCHEMAS: Final = {
    **dict.fromkeys(WORKFLOWS, "vendor.github-workflows"),
    **dict.fromkeys(ACTIONS, "vendor.github-actions"),
}

_PINNED: Final = re.compile(r"uses: [\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")
_OWN: Final = re.compile(r"uses: \$/[\w./-]+$")
_INPUT: Final = re.compile(r"\$\[\[\s*inputs\.([\w-]+)\s*\]\]")
_EXPRESSION: Final = re.compile(r"\$\{\{.*?\}\}", re.DOTALL)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def load_component(path: Path) -> tuple[Any, Any]:
    """A component's specification, and its jobs."""
    spec, jobs = yaml.safe_load_all(path.read_text("utf-8"))
    return spec["spec"], jobs


def tool(name: str) -> str:
    """A linter, of this environment or of the machine."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"{name} is missing: make lint sets up what tests need"
    return found


def steps_of(document: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a workflow or of a composite action."""
    yield from document.get("runs", {}).get("steps", [])
    for job in document.get("jobs", {}).values():
        yield from job.get("steps", [])


def scripts() -> Iterator[tuple[str, str, str]]:
    """Every script: where, for which shell, and its text."""
    for path in (*WORKFLOWS, *ACTIONS):
        for step in steps_of(load(path)):
            if "run" in step:
                yield f"{path.name}: {step['name']}", "bash", step["run"]
    for path in COMPONENTS:
        _, jobs = load_component(path)
        for name, job in jobs.items():
            for part in ("before_script", "script", "after_script"):
                if part in job:
                    yield f"{path.name}: {name} {part}", "sh", "\n".join(job[part])


SCRIPTS: Final = [pytest.param(*rest, id=name) for name, *rest in scripts()]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(("shell", "script"), SCRIPTS)
def test_scripts_hold_nothing_that_is_pasted_in(shell: str, script: str) -> None:
    """What strangers wrote reaches a script as a variable; GitHub pastes before a shell reads."""
    assert "${{" not in script
    assert "$[[" not in script


@pytest.mark.parametrize(("shell", "script"), SCRIPTS)
def test_scripts_pass_shellcheck(shell: str, script: str) -> None:
    done = subprocess.run(
        [tool("shellcheck"), f"--shell={shell}", "-"],
        input=f"set -e\n{script}",  # as both run it
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""


@pytest.mark.parametrize("script", sorted((ROOT / "scripts" / "ci").glob("*.sh")), ids=name_of)
def test_scripts_of_their_own_pass_shellcheck(script: Path) -> None:
    done = subprocess.run([tool("shellcheck"), script], capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize("path", SCHEMAS, ids=name_of)
def test_github_files_have_their_form(path: Path) -> None:
    check_schema(SCHEMAS[path], path)


@pytest.mark.parametrize("path", COMPONENTS, ids=name_of)
def test_components_have_the_form_of_gitlab(path: Path, tmp_path: Path) -> None:
    """With its inputs put in, as GitLab does before it checks."""
    spec, _ = load_component(path)
    header, _, body = path.read_text("utf-8").partition("\n---\n")

    def value(found: re.Match[str]) -> str:
        assert found[1] in spec["inputs"], f"no input is called {found[1]}"
        return str(spec["inputs"][found[1]].get("default") or "some")

    (tmp_path / "header.yml").write_text(header, "utf-8")
    (tmp_path / "jobs.yml").write_text(_INPUT.sub(value, body), "utf-8")
    check_schema("vendor.gitlab-ci", tmp_path / "header.yml", tmp_path / "jobs.yml")


def check_schema(schema: str, *paths: Path) -> None:
    done = subprocess.run(
        [tool("check-jsonschema"), "--builtin-schema", schema, *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", [*WORKFLOWS, *ACTIONS], ids=name_of)
def test_every_action_is_pinned_by_its_commit(path: Path) -> None:
    """With the version that the commit is, so that people can tell; ours by the running commit."""
    used = [line.strip(" -") for line in path.read_text("utf-8").splitlines() if "uses:" in line]
    used = [line for line in used if not line.startswith("#")]
    assert [line for line in used if not _PINNED.search(line) and not _OWN.search(line)] == []
    assert used


def test_one_action_has_one_version() -> None:
    text = "".join(path.read_text("utf-8") for path in (*WORKFLOWS, *ACTIONS))
    pins = dict.fromkeys(re.findall(r"uses: (\S+)@([0-9a-f]{40} # \S+)", text))
    assert len(pins) == len({name for name, _ in pins})


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_workflows_may_do_nothing_but_what_a_job_says(path: Path) -> None:
    document = load(path)
    assert document["permissions"] == {}
    assert "concurrency" in document
    triggers = document[True]
    assert not {"pull_request_target", "workflow_run", "issue_comment"} & set(triggers)
    for name, job in document["jobs"].items():
        assert "permissions" in job, name
        lines = path.read_text("utf-8").splitlines()
        for permission, level in job["permissions"].items():
            (where, *_) = [line for line in lines if f"{permission}: {level} #" in line]
            assert len(where.partition("#")[2]) > 8, f"{permission} of {name} has no reason"
        if "uses" not in job:
            assert 0 < job["timeout-minutes"] <= 360, name


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_no_job_both_loads_a_model_and_has_an_identity(path: Path) -> None:
    for name, job in load(path)["jobs"].items():
        commands = {
            step.get("with", {}).get("command", "build")
            for step in job.get("steps", [])
            if step.get("uses") == "$/."
        }
        if job["permissions"].get("id-token") == "write" and "uses" not in job:
            assert commands <= {"sign", "push"}, name


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_no_checkout_leaves_its_token(path: Path) -> None:
    for step in steps_of(load(path)):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", [*WORKFLOWS, *ACTIONS], ids=name_of)
def test_secrets_are_the_one_that_is_declared(path: Path) -> None:
    """And reach one step alone."""
    text = path.read_text("utf-8")
    assert re.findall(r"secrets\.([\w-]+)", text) in ([], ["signing-key"])
    assert "secrets: inherit" not in text


@pytest.mark.parametrize("path", ACTIONS, ids=name_of)
def test_inputs_of_the_action_are_used_and_documented(path: Path) -> None:
    document = load(path)
    text = path.read_text("utf-8")
    for name, about in document["inputs"].items():
        assert len(about["description"]) > 20, name
        assert f"inputs.{name}" in text, name
        assert f"| `{name}` |" in DOCS, name
    for name in document["outputs"]:
        assert f"| `{name}` |" in DOCS, name
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == set(document["inputs"])


def test_inputs_of_the_reusable_workflow_are_used_and_documented() -> None:
    path = ROOT / ".github" / "workflows" / "build-and-publish.yml"
    call = load(path)[True]["workflow_call"]
    text = path.read_text("utf-8")
    for kind in ("inputs", "secrets", "outputs"):
        for name, about in call[kind].items():
            assert len(about["description"]) > 20, name
            assert f"| `{name}` |" in DOCS, name
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == set(call["inputs"])


@pytest.mark.parametrize("path", COMPONENTS, ids=name_of)
def test_inputs_of_components_are_used_and_documented(path: Path) -> None:
    spec, _ = load_component(path)
    assert set(_INPUT.findall(path.read_text("utf-8"))) == set(spec["inputs"])
    for name, about in spec["inputs"].items():
        assert len(about["description"]) > 20, name
        assert f"| `{name}` |" in DOCS, name


def test_expressions_are_where_nothing_is_executed() -> None:
    """In `env`, `with`, `if` and the like; a name or a run is shown or executed as it is."""
    for path in (*WORKFLOWS, *ACTIONS):
        for step in steps_of(load(path)):
            for key in ("run", "shell", "uses", "working-directory"):
                assert not _EXPRESSION.search(str(step.get(key, ""))), (path.name, step)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("actionlint", ["-shellcheck", "{shellcheck}"]),
        ("zizmor", ["--offline", "--persona=auditor"]),
    ],
)
def test_linters_find_nothing(name: str, options: list[str]) -> None:
    places = [str(ROOT)] if name == "zizmor" else [str(path) for path in WORKFLOWS]
    given = [option.replace("{shellcheck}", tool("shellcheck")) for option in options]
    done = subprocess.run(
        [tool(name), *given, *places], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finding" not in done.stdout.replace("No findings to report", "")
