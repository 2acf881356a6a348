"""Which CI run provenance names: one that everybody can see, or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nf4_pipeline.provenance.ci_run import CiRun, current_run

GITHUB = {
    "GITHUB_ACTIONS": "true",
    "GITHUB_SERVER_URL": "https://github.com",
    "GITHUB_REPOSITORY": "me/code",
    "GITHUB_WORKFLOW_REF": "me/code/.github/workflows/publish.yml@refs/heads/main",
    "GITHUB_RUN_ID": "77",
}
GITLAB = {
    "GITLAB_CI": "true",
    "CI_PROJECT_VISIBILITY": "public",
    "CI_PROJECT_URL": "https://gitlab.com/me/code",
    "CI_CONFIG_PATH": "ci/publish.yml",
    "CI_COMMIT_REF_NAME": "main",
    "CI_PIPELINE_URL": "https://gitlab.com/me/code/-/pipelines/78",
}
PUBLIC = {"repository": {"private": False, "visibility": "public"}}


def at_github(folder: Path, event: Any = PUBLIC, **changes: str) -> dict[str, str]:
    path = folder / "event.json"
    path.write_text(event if isinstance(event, str) else json.dumps(event))
    return GITHUB | {"GITHUB_EVENT_PATH": str(path)} | changes


def test_a_public_run_is_named_as_its_certificate_is(tmp_path: Path) -> None:
    assert current_run(at_github(tmp_path)) == CiRun(
        builder="https://github.com/me/code/.github/workflows/publish.yml@refs/heads/main",
        invocation="https://github.com/me/code/actions/runs/77",
    )
    assert current_run(GITLAB) == CiRun(
        builder="https://gitlab.com/me/code//ci/publish.yml@refs/heads/main",
        invocation="https://gitlab.com/me/code/-/pipelines/78",
    )
    tagged = current_run(GITLAB | {"CI_COMMIT_TAG": "v1"})
    assert tagged is not None
    assert tagged.builder.endswith("@refs/tags/v1")


@pytest.mark.parametrize(
    "event",
    [
        {"repository": {"private": True, "visibility": "private"}},
        {"repository": {"private": False, "visibility": "internal"}},
        {"repository": {"private": "false"}},
        {"repository": {}},
        {"repository": None},
        {"schedule": "0 0 * * *"},
        [],
        "no json",
        "[" * 100_000,
    ],
)
def test_a_repository_that_may_be_private_is_not_named(tmp_path: Path, event: Any) -> None:
    assert current_run(at_github(tmp_path, event)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"GITHUB_ACTIONS": "false"},
        {"GITHUB_EVENT_PATH": "/nowhere"},
        {"GITHUB_SERVER_URL": ""},
        {"GITHUB_SERVER_URL": "javascript:alert(1)//"},
        {"GITHUB_WORKFLOW_REF": ""},
        {"GITHUB_WORKFLOW_REF": "other/code/.github/workflows/publish.yml@refs/heads/main"},
        {"GITHUB_WORKFLOW_REF": "me/code/x.yml"},
        {"GITHUB_WORKFLOW_REF": "me/code/x.yml@refs/heads/<script>"},
        {"GITHUB_WORKFLOW_REF": "me/code/x.yml@refs/heads/a\nb"},
        {"GITHUB_RUN_ID": "7 7"},
        {"GITHUB_RUN_ID": "7" * 2_000},
    ],
)
def test_variables_that_name_no_run(tmp_path: Path, changes: dict[str, str]) -> None:
    assert current_run(at_github(tmp_path, **changes)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"CI_PROJECT_VISIBILITY": "private"},
        {"CI_PROJECT_VISIBILITY": "internal"},
        {"CI_PROJECT_VISIBILITY": ""},
        {"CI_PIPELINE_URL": "https://gitlab.com/other/-/pipelines/78"},
        {"GITLAB_CI": ""},
    ],
)
def test_gitlab_that_names_none(changes: dict[str, str]) -> None:
    assert current_run(GITLAB | changes) is None


def test_outside_of_ci_there_is_none() -> None:
    assert current_run({}) is None
