"""The CI run that makes an artifact, as provenance names it: facts that everybody can see anyway.

What a job's variables say is a claim, like all of provenance.json. It becomes more where the
artifact is signed without a key: the certificate names a workflow, and a job only gets its own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nf4_pipeline.documents import Document

_ADDRESS: Final = re.compile(r"https?://[A-Za-z0-9.-]+(:\d+)?(/[\w.@:+~%=-]*)+", re.ASCII)
_LONGEST: Final = 1_000  # characters
_LARGEST_EVENT: Final = 2**24  # bytes


@dataclass(frozen=True, kw_only=True)
class CiRun(Document):
    """A run of a workflow in a repository that is public.

    Attributes:
        builder: the workflow at its ref, as Sigstore's certificates name it.
        invocation: the run, where its log is.
    """

    builder: str
    invocation: str


def current_run(environment: Mapping[str, str] = os.environ) -> CiRun | None:
    """The run that this is part of; None outside CI, and where its repository is not public."""
    if environment.get("GITHUB_ACTIONS") == "true" and _is_public_at_github(environment):
        server = environment.get("GITHUB_SERVER_URL", "")
        repository = f"{server}/{environment.get('GITHUB_REPOSITORY', '')}"
        builder = f"{server}/{environment.get('GITHUB_WORKFLOW_REF', '')}"
        run = f"{repository}/actions/runs/{environment.get('GITHUB_RUN_ID', '')}"
    elif (
        environment.get("GITLAB_CI") == "true"
        and environment.get("CI_PROJECT_VISIBILITY") == "public"
    ):
        repository, file = environment.get("CI_PROJECT_URL", ""), environment.get("CI_CONFIG_PATH")
        tag = environment.get("CI_COMMIT_TAG")
        ref = f"tags/{tag}" if tag else f"heads/{environment.get('CI_COMMIT_REF_NAME', '')}"
        builder = f"{repository}//{file or '.gitlab-ci.yml'}@refs/{ref}"
        run = environment.get("CI_PIPELINE_URL", "")
    else:
        return None
    inside = all(text.startswith(f"{repository}/") for text in (builder, run))
    whole = all(len(text) <= _LONGEST and _ADDRESS.fullmatch(text) for text in (builder, run))
    return CiRun(builder=builder, invocation=run) if inside and whole and "@" in builder else None


def _is_public_at_github(environment: Mapping[str, str]) -> bool:
    """What the event that started the run says of the repository."""
    path = Path(environment.get("GITHUB_EVENT_PATH", ""))
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_EVENT:
            return False
        repository = json.loads(path.read_bytes())["repository"]
        return repository["private"] is False and repository.get("visibility", "public") == "public"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False
