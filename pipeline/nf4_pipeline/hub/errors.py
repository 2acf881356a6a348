"""What a failed call of the client means: may it pass, and what should the user do about it."""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import dataclass

from nf4_pipeline.errors import ConflictError, HubError, NotFoundError, PipelineError, ResourceError
from nf4_pipeline.hub import cache, publisher
from nf4_pipeline.hub.replies import ReplyError, shown
from nf4_pipeline.printable import printable

# Names, because the client's HTTP library is httpx up to 1.x and httpx2 since; RuntimeError is what
# its transfer library for Xet repos raises.
_PASSING = {
    "ConnectionError",
    "NetworkError",
    "RemoteProtocolError",
    "RuntimeError",
    "TimeoutException",
}
_NO_ANSWER = {"ConnectionError", "TransportError"}


@dataclass(frozen=True)
class Request:
    """What a call is about, for its messages: "{doing}: …".

    `writes` says that it needs write access, `commits` that it changes a branch.
    """

    repo_id: str
    revision: str
    doing: str
    writes: bool = False
    commits: bool = False


def may_pass(error: BaseException) -> bool:
    """Whether the same call may go well in a moment."""
    from huggingface_hub import errors

    error = _root(error)
    if isinstance(error, ReplyError):
        return error.passing
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if publisher.concerns(error):
            return status in (408, 429) or status >= 500
        # What a signed address refuses, a newly signed one may give. 422: bytes came wrong.
        expired = status in (400, 401, 403) and _is_elsewhere(_url(error))
        return status in (408, 422, 429) or status >= 500 or expired
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return False  # the client itself has tried this one for half a minute
    if isinstance(error, json.JSONDecodeError):
        return True  # the page of a proxy, or half an answer
    return bool(_kinds(error) & _PASSING) or "Consistency check failed" in str(error)


def was_not_answered(error: BaseException) -> bool:
    """Whether the Hub stayed silent, so that it may still be at work on the request."""
    return "TimeoutException" in _kinds(_root(error))


def was_refused(error: BaseException) -> bool:
    """Whether the Hub does not accept the token that it was asked with."""
    error = _root(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status == 401 and not _is_elsewhere(_url(error)) and not publisher.concerns(error)


def translate_error(error: BaseException, request: Request) -> PipelineError:
    """Says what went wrong and what to do about it, in one message."""
    from huggingface_hub import constants, errors

    error = _root(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ResourceError(
            f"{request.doing}: the disk is full. Make room, or set HF_HOME to a larger disk."
        )
    repo_id, endpoint = request.repo_id, constants.ENDPOINT
    token = _stored_token()
    named = publisher.resource()
    access = "the token that is set has no access to it" if token else "no token is set"
    if named is not None:
        access = (
            f"the token of this CI job, for {named}, has no access to it, or has come to its end"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    kind: type[HubError] = HubError
    if publisher.concerns(error):
        text = _exchange(error, status, request, endpoint)
    elif isinstance(error, errors.GatedRepoError):
        text = (
            f"{repo_id} is gated, and {access}: accept the licence at {endpoint}/{repo_id} "
            "and set HF_TOKEN to a token of that account."
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        kind = NotFoundError
        text = (
            f"{repo_id} was not found at {endpoint}, or it is private and {access}: "
            "check the name, or set HF_TOKEN."
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        kind = NotFoundError
        text = f"{repo_id} has no revision {request.revision!r}. "
        if request.revision != constants.DEFAULT_REVISION:
            text += "Leave --revision out for main, or take "
        else:
            text += "Give --revision with "
        text += f"a branch, a tag or a commit that {endpoint}/{repo_id}/tree/main shows."
    elif isinstance(error, errors.OfflineModeIsEnabled):
        text = f"{request.doing}: HF_HUB_OFFLINE is set. Unset it: this needs the Hub."
    elif isinstance(error, ReplyError):
        text = (
            f"{request.doing}: {endpoint} {error}. No Hub does that: check HF_ENDPOINT, and what "
            "stands between this machine and it."
        )
    elif named is not None and status in (401, 403) and not _is_elsewhere(_url(error)):
        text = (
            f"{request.doing}: {_fault(error, status, endpoint, None)} to the token that it gave "
            f"this CI job for {named}: "
        )
        text += (
            "it has ended. Run the same command in a new job, which gets another; it does nothing "
            "twice."
            if status == 401
            else f"does {endpoint}/{named}/settings, under Trusted Publishers, let it only read?"
        )
    elif token and not (token.isascii() and token.isprintable()):
        text = f"{request.doing}: HF_TOKEN has characters that no token has: copy it again."
    elif status == 401 and token and not _is_elsewhere(_url(error)):
        text = (
            f"{request.doing}: {endpoint} does not accept the token that is set: it may be out of "
            f"date, or cut off. {_token_remedy(endpoint)}"
        )
    elif status == 401 and not token:
        text = f"{request.doing}: {endpoint} asks for a token, and none is set: set HF_TOKEN."
    else:
        kind = ConflictError if status == 412 and request.commits else HubError
        text = f"{request.doing}: {_fault(error, status, endpoint, token)}. "
        text += _remedy(status, request, error)
    return kind(printable(without_secrets(text, token)))


def _token_remedy(endpoint: str) -> str:
    """How to be rid of a token that is not accepted, by where it comes from."""
    new = f"Make a new one at {endpoint}/settings/tokens"
    if os.environ.get("HF_TOKEN"):
        return f"{new} and set HF_TOKEN to it; a public model needs none: unset HF_TOKEN"
    return f"{new}, then: hf auth login. A public model needs none: hf auth logout"


def _stored_token() -> str | None:
    """The token that is set; never one that would have to be asked for."""
    from huggingface_hub import get_token

    return None if publisher.resource() is not None else get_token()


def _exchange(error: BaseException, status: int | None, request: Request, endpoint: str) -> str:
    """What went wrong between a CI job's identity and a token."""
    name = publisher.resource()
    doing = f"{request.doing}: a token for {name} in exchange for the identity of this CI job"
    url = publisher.address(error)
    if not url:  # the client asked nobody
        return (
            f"{doing} cannot be asked for: this job has no identity. GitHub Actions gives one to a "
            "job with `permissions: id-token: write`; elsewhere put the id token that CI makes for "
            f"the audience {endpoint} into {publisher.ID_TOKEN}. Or unset HF_OIDC_RESOURCE and set "
            "HF_TOKEN."
        )
    if publisher.is_issuer(url):
        issuer = url.partition("?")[0]
        said = str(error) if isinstance(error, ReplyError) else _fault(error, status, issuer, None)
        said = said if said.startswith(issuer) else f"{issuer} {said}"
        return (
            f"{doing} was not had: the issuer of id tokens that CI names failed: {said}. Does the "
            "job have `permissions: id-token: write`? If so, run it again later."
        )
    if isinstance(error, ReplyError):
        return f"{doing} was not had: {endpoint} {error}. No Hub does that: check HF_ENDPOINT."
    said = _fault(error, status, endpoint, None)
    if status is None or status == 429 or status >= 500:
        return f"{doing} was not had: {said}. Check HF_ENDPOINT, and run this again later."
    return f"{doing} was refused: {said}. {publisher.remedy(endpoint)}"


def _remedy(status: int | None, request: Request, error: BaseException) -> str:
    from huggingface_hub import constants

    commit = None if request.writes else cache.cached_commit(request.repo_id, request.revision)
    offline = f"; --offline or HF_HUB_OFFLINE=1 uses the cached commit {commit}." if commit else "."
    if status == 403 and request.writes:
        return (
            f"Use a token that may write to {request.repo_id} (make one at "
            f"{constants.ENDPOINT}/settings/tokens, with write access), and check the name: the "
            "owner must be you, or an organization of yours."
        )
    if status == 403:
        return f"Check that your token may read {request.repo_id}{offline}"
    if status == 404:
        return f"Check HF_ENDPOINT: a Hub should have this address{offline}"
    if status == 409:
        return f"Another operation on it is under way: try again in a minute{offline}"
    if status == 412 and request.commits:
        return (
            f"Somebody else changed {request.repo_id} meanwhile. Look at what they did, then run "
            "this again with --force to put the export over it."
        )
    if status == 429:
        return f"It asks for fewer requests: try again in some minutes{offline}"
    if request.commits and was_not_answered(error):
        return (
            "It may have been done all the same. Run the same command again in a minute: it looks "
            "at the repo first, and does nothing twice."
        )
    if status is None and _kinds(error) & _NO_ANSWER and not was_not_answered(error):
        if request.writes:
            return f"{_where_from()} Then run the same command again: it does nothing twice."
        cached = f", or take the cached commit {commit}: add --offline" if commit else ""
        return (
            f"{_where_from()} Without a network: name a local folder that holds the model; where "
            f"an artifact will do, `nf4 status` lists those on this machine{cached}."
        )
    if status is None and "Invalid metadata" in str(error):
        return "Correct the card (README.md of the source), and run `nf4 build` again."
    return f"Try again later{offline}"


def _where_from() -> str:
    """What to look at if an address does not answer, by where it comes from."""
    if not os.environ.get("HF_ENDPOINT"):
        return "Check the network."
    return (
        "That address comes from HF_ENDPOINT: correct it, or unset it to ask huggingface.co; else "
        "check the network."
    )


def _why_silent(error: BaseException, first: str) -> str:
    """Why nobody answers, in the words of the system where it has some."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror and type(seen).__module__ == "builtins":
            return seen.strerror.lower()
        seen = seen.__cause__ or seen.__context__
    words = re.sub(r"\[Errno -?\d+\] ", "", first)
    return words[:1].lower() + words[1:] if words else type(error).__name__


def _root(error: BaseException) -> BaseException:
    """What lies under the client's own wrapping, such as "Error while uploading x to the Hub."."""
    from huggingface_hub import errors

    wrappers = (errors.LocalEntryNotFoundError, ValueError, RuntimeError)
    # An answer of 400 is a ValueError, too, and has words that its cause does not have.
    answered = errors.BadRequestError
    while (
        isinstance(error, wrappers)
        and not isinstance(error, answered)
        and error.__cause__ is not None
    ):
        error = error.__cause__
    return error


def _kinds(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _url(error: BaseException) -> str:
    """The address that was asked."""
    return str(getattr(getattr(error, "response", None), "url", ""))


def _is_elsewhere(url: str) -> bool:
    """Whether an address is not the Hub's own: its CDN's, its store's."""
    from huggingface_hub import constants

    return not url.startswith(constants.ENDPOINT.rstrip("/") + "/")


def _fault(error: BaseException, status: int | None, endpoint: str, token: str | None) -> str:
    words = getattr(error, "server_message", None) if status else str(error)
    first = without_secrets(words or "", token).strip().partition("\n")[0][:200].rstrip(".")
    if status:
        return f"{endpoint} answered {status}" + (f" ({first})" if first else "")
    if "Consistency check failed" in first:
        return f"{endpoint} sent more or fewer bytes than it announced"
    if isinstance(error, LookupError | TypeError | AttributeError | ArithmeticError):
        kind = type(error).__name__
        return f"{endpoint} answered in a form that the client cannot read ({kind}: {shown(first)})"
    if was_not_answered(error):
        return f"{endpoint} stopped answering ({type(error).__name__})"
    if _kinds(error) & _NO_ANSWER:
        return f"{endpoint} cannot be reached ({_why_silent(error, first)})"
    what = "the Hub client failed"
    return f"{what} ({type(error).__name__}{': ' + first if first else ''})"


_kept_out: set[str] = set()
_SHORTEST_SECRET = 8  # characters: less would take words out of messages


def keep_out(secret: str) -> None:
    """Remembers a token that was sent or came, so that no message holds it."""
    if len(secret) >= _SHORTEST_SECRET:
        _kept_out.add(secret)


def without_secrets(text: str, token: str | None) -> str:
    """Takes tokens, and what addresses carry besides their path, out of a text."""
    given = (os.environ.get(name) for name in (publisher.ID_TOKEN, publisher.REQUEST_TOKEN))
    for secret in sorted({*_kept_out, *filter(None, (token, *given))}, key=len, reverse=True):
        text = text.replace(secret, "***")
    text = re.sub(r"(?<=//)[^/@\s]+@", "", text)
    text = re.sub(r"\bhf_[\w.-]{8,}", "***", text)
    text = re.sub(r"\beyJ[\w-]{8,}(\.[\w-]*)*", "***", text)
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", text)
