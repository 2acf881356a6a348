"""Trusted publishers: a token that a CI job's identity is exchanged for. No secret is stored.

    CI's issuer ──► id token ──► POST HF_ENDPOINT/oauth/token ──► a token of an hour, for one repo

The client does both requests by itself, and again before the token ends, wherever HF_OIDC_RESOURCE
names what the token is for. Here stands when a push asks for that, and what a refusal means;
`transport` lets what CI hands out go to the issuer that CI names, and to nobody else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from nf4_pipeline.errors import HubError
from nf4_pipeline.hub.replies import ReplyError

RESOURCE: Final = "HF_OIDC_RESOURCE"
ID_TOKEN: Final = "HF_OIDC_ID_TOKEN"
REQUEST_URL: Final = "ACTIONS_ID_TOKEN_REQUEST_URL"
REQUEST_TOKEN: Final = "ACTIONS_ID_TOKEN_REQUEST_TOKEN"
EXCHANGE: Final = "/oauth/token"
"""Where a Hub exchanges, below its address."""
WITHOUT_TOKEN: Final = (
    " Or let this CI job say who it is, which needs none: `permissions: id-token: write` in GitHub "
    "Actions, HF_OIDC_ID_TOKEN among the `id_tokens` of GitLab; and add it to the Trusted "
    "Publishers in the repo's settings."
)


def resource() -> str | None:
    """What the client asks a token for; None if it takes the one that is stored."""
    return os.environ.get(RESOURCE) or None


def is_in_ci() -> bool:
    """Whether this is a job of a CI that makes id tokens."""
    return "true" in (os.environ.get("GITHUB_ACTIONS"), os.environ.get("GITLAB_CI"))


def is_offered() -> bool:
    """Whether this is a CI job that can say who it is."""
    if os.environ.get(ID_TOKEN):
        return True
    in_github = os.environ.get("GITHUB_ACTIONS") == "true"
    return in_github and all(os.environ.get(name) for name in (REQUEST_URL, REQUEST_TOKEN))


@contextmanager
def pushing(repo_id: str) -> Iterator[bool]:
    """Lets the client exchange the job's identity for a token of the repo, where it may.

    It does so if HF_OIDC_RESOURCE names the repo, which goes before a token that is stored, and if
    no token is stored in a CI job that can say who it is. Gives whether it does.

    Raises:
        HubError: HF_OIDC_RESOURCE names something else than the repo.
    """
    from huggingface_hub import get_token

    named = resource()
    if named is not None:
        if named != repo_id:
            raise HubError(
                f"HF_OIDC_RESOURCE is {named}, and a token for that cannot push to {repo_id}. Set "
                f"it to {repo_id} for this command, or unset it: in CI, nf4 push asks for a token "
                "of the repo that it pushes to by itself."
            )
        yield True
    elif is_offered() and get_token() is None:
        # The client reads it with every request, and from nowhere else.
        os.environ[RESOURCE] = repo_id
        try:
            yield True
        finally:
            os.environ.pop(RESOURCE, None)
    else:
        yield False


def concerns(error: BaseException) -> bool:
    """Whether a fault is one of the exchange, and not of what the token is for."""
    from huggingface_hub import constants, errors

    if isinstance(error, getattr(errors, "OIDCError", ())):
        return True
    url = address(error)
    return (
        resource() is not None
        and bool(url)
        and (url == constants.ENDPOINT.rstrip("/") + EXCHANGE or is_issuer(url))
    )


def is_issuer(url: str) -> bool:
    """Whether an address is the one where CI says that id tokens are to be had.

    Its query is the client's to make.
    """
    issuer = os.environ.get(REQUEST_URL, "")
    return issuer != "" and url.partition("?")[0] == issuer.partition("?")[0]


def address(error: BaseException) -> str:
    """The address that was asked; "" if the fault does not say."""
    if isinstance(error, ReplyError):
        return error.address
    for holder in (getattr(error, "response", None), error):
        try:
            if url := str(getattr(getattr(holder, "request", None), "url", "")):
                return url
        except RuntimeError:  # of the HTTP library, for an error that knows no request
            continue
    return ""


def remedy(endpoint: str) -> str:
    """What to set up, or to do, where an exchange was refused."""
    name = resource() or ""
    if "/" in name:
        where = f"{endpoint}/{name}/settings, under Trusted Publishers (the repo has to exist)"
    else:
        where = f"{endpoint}/settings/authentication, under CI/CD Access"
    facts = [
        f"{fact}={value}"
        for fact, variable in (
            ("repository", "GITHUB_REPOSITORY"),
            ("ref", "GITHUB_REF"),
            ("workflow", "GITHUB_WORKFLOW_REF"),
            ("project_path", "CI_PROJECT_PATH"),
            ("ref", "CI_COMMIT_REF_NAME"),
        )
        if (value := os.environ.get(variable))
    ]
    job = f" this job ({', '.join(facts)})" if facts else " the repository that this job runs in"
    if os.environ.get(ID_TOKEN):
        return (
            f"Add{job} at {where}. The id token in {ID_TOKEN} must be made for the audience "
            f"{endpoint}, is valid for minutes and can be exchanged once: run a job anew that does "
            "nothing but push, and set HF_OIDC_RESOURCE for no other command."
        )
    return (
        f"Add{job} at {where}, then run this again: each run gets an id token of its own. Or set "
        "HF_TOKEN, and no HF_OIDC_RESOURCE."
    )
