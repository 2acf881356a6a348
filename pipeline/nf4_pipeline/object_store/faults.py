"""What a store refused, as errors of ours; and which faults pass, so that trying again may help.

Clients of stores raise what Python has (PermissionError, FileNotFoundError, TimeoutError), and for
the rest classes of their own, which are known here by their names: none of them needs to be
installed.
"""

from __future__ import annotations

import errno
from typing import Final

from nf4_pipeline.errors import PipelineError, StoreError

_NO_CREDENTIALS: Final = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "SSOTokenLoadError",
    "UnauthorizedSSOTokenError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "ClientAuthenticationError",
}
_MALFORMED: Final = {"ParamValidationError", "InvalidEndpointConfigurationError"}
_PERMANENT: Final = {
    errno.ENOSPC: "it is full",
    errno.EDQUOT: "the quota there is used up",
    errno.EROFS: "it can be read only",
    errno.ENAMETOOLONG: "a name is too long there",
    errno.ENOTDIR: "a file stands where a folder should be",
    errno.EISDIR: "a folder stands where a file should be",
    errno.ELOOP: "a link there leads to itself",
    errno.EINVAL: "it refused the request",
    errno.ENOSYS: "it cannot do that",
}


def refusal(error: Exception, url: str, doing: str) -> PipelineError | None:
    """What a store refused, so that trying again does not help; None of any other fault.

    Args:
        error: what its client raised.
        url: of the build.
        doing: what was to be done, such as "write build.json".
    """
    where, said = f"{url}: cannot {doing}", _said(error)
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _NO_CREDENTIALS:
        return StoreError(
            f"{where}: no credentials were found ({said}). Give this user some as the client of "
            "that store wants them (for S3: AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY), then run the same command again."
        )
    if names & _MALFORMED:
        return StoreError(f"{where}: {said}. Name another --build-dir.")
    if isinstance(error, PermissionError):
        return StoreError(
            f"{where}: permission denied ({said}). The build needs to list, read, write and delete "
            "below this URL: give these credentials the right to it, or name another --build-dir."
        )
    if isinstance(error, FileNotFoundError) and _code(error) != "NoSuchUpload":
        return StoreError(
            f"{where}: there is no such bucket or folder ({said}). Make it, or name another "
            "--build-dir."
        )
    if isinstance(error, NotImplementedError):
        return StoreError(f"{where}: that file system cannot do it. Name another --build-dir.")
    if isinstance(error, OSError) and error.errno in _PERMANENT:
        return StoreError(
            f"{where}: {_PERMANENT[error.errno]} ({said}). Change that, or name another "
            "--build-dir; then run the same command again."
        )
    return None


def passes(error: Exception) -> bool:
    """Whether a fault that is no refusal may pass: of the network, or of the store itself."""
    foreign = type(error).__module__.partition(".")[0] not in ("builtins", "nf4_pipeline")
    # A file of memory:// cannot grow in the moment in which another thread asks for its size.
    return isinstance(error, OSError | BufferError) or (
        foreign and not isinstance(error, TypeError)
    )


def trying_again(error: Exception, url: str, doing: str) -> str:
    """What to tell people who wait; the arguments are those of `refusal`."""
    return f"Warning: {url}: cannot {doing}: {_said(error)}. Trying again for a while."


def lost(error: Exception, url: str, doing: str, seconds: float) -> StoreError:
    """A store that did not answer for too long.

    Args:
        error: what its client raised last.
        url: of the build.
        doing: as in `refusal`.
        seconds: for which it was tried.
    """
    return StoreError(
        f"{url}: cannot {doing}: tried for {seconds:.0f} s; the last fault: {_said(error)}. "
        "What was put there whole is kept, and nothing counts that was not. See that the store "
        "answers (for S3 also AWS_ENDPOINT_URL), then run the same command again: it continues."
    )


def _code(error: Exception) -> str:
    """What a store of S3's kind calls a fault."""
    response = getattr(error.__cause__, "response", None)
    said = response.get("Error", {}) if isinstance(response, dict) else {}
    return str(said.get("Code", ""))


def _said(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return (text or type(error).__name__)[:300]
