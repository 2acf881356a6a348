"""Signatures without a key: who signed is said by a certificate that Sigstore gave to an identity.

    identity token ──► Fulcio: a certificate of ten minutes ──► signature ──► Rekor: a public log

Sigstore is asked through model-signing and sigstore, which check all that comes back. This module
says where the identity token comes from, how long Sigstore may take, and what went wrong.
"""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from nf4_pipeline.checkpoint.plain_file import check_plain
from nf4_pipeline.errors import SignatureError, UsageError
from nf4_pipeline.hub.errors import keep_out, without_secrets
from nf4_pipeline.printable import printable

T = TypeVar("T")

AUDIENCE: Final = "sigstore"
TOKEN_VARIABLE: Final = "SIGSTORE_ID_TOKEN"
_PATIENCE: Final = 120.0  # seconds for all that is asked of Sigstore and of CI's issuer
_LARGEST_TRUST: Final = 2**22  # bytes
_SHOWN: Final = 400  # characters of what a library or a server says
_LOGGERS: Final = ("sigstore", "model_signing", "id", "tuf", "urllib3")
_UNREACHED: Final = re.compile(r"HTTPS?ConnectionPool\(host='([^']*)'.*")
_OF_IDENTITY: Final = (
    "Let a CI job say who it is: GitHub Actions needs `permissions: id-token: write`, GitLab "
    f"`id_tokens: {TOKEN_VARIABLE}: aud: {AUDIENCE}`. Elsewhere put a token that an issuer made "
    f"for the audience {AUDIENCE} into {TOKEN_VARIABLE}."
)


@dataclass(frozen=True)
class Instance:
    """Which Sigstore: the public one, its staging twin, or that which a file describes.

    Attributes:
        trust: a client trust configuration, in the JSON of Sigstore.
        staging: the public twin that is for tests.
    """

    trust: Path | None = None
    staging: bool = False

    def check(self) -> None:
        """Looks whether the file can be one.

        Raises:
            UsageError: both are set, or the file cannot be read or is no trust configuration.
        """
        if self.trust is None:
            return
        if self.staging:
            raise UsageError("--staging and --trust-config name two instances: leave one out.")
        try:
            check_plain(self.trust, _LARGEST_TRUST)
        except OSError as error:
            raise UsageError(f"{self.trust} cannot be read: {error.strerror}.") from error
        from sigstore.models import ClientTrustConfig

        try:
            ClientTrustConfig.from_json(self.trust.read_text("utf-8"))
        except ValueError as error:
            raise UsageError(
                f"{self.trust} is no trust configuration ({words(error)}); expected the JSON of "
                "Sigstore's ClientTrustConfig, which whoever runs the instance hands out."
            ) from error

    def __str__(self) -> str:
        if self.trust is not None:
            return f"the Sigstore of {self.trust}"
        return "Sigstore's staging instance" if self.staging else "Sigstore"


@dataclass(frozen=True)
class Signer:
    """Who a certificate says signed, and who says so."""

    identity: str
    issuer: str


def identity_token(given: str | None) -> str:
    """The token that says who signs: the one that is given, or that which CI makes for this job.

    Raises:
        UsageError: no token is given and CI makes none for this job, or the token cannot be used.
    """
    from sigstore.oidc import IdentityError, IdentityToken, detect_credential

    try:
        token = given or within(lambda: detect_credential(AUDIENCE), "CI's issuer of id tokens")
    except IdentityError as error:
        raise UsageError(f"CI gives this job no identity: {words(error)}. {_OF_IDENTITY}") from None
    except SignatureError as error:
        raise UsageError(f"{error} {_OF_IDENTITY}") from None
    if not token:
        raise UsageError(
            f"Signing without a key needs an identity, and there is none. {_OF_IDENTITY}"
        )
    keep_out(token)
    try:
        IdentityToken(token, AUDIENCE)
    except IdentityError as error:
        raise UsageError(
            f"The identity token cannot be used: {words(error.__cause__ or error)}. It must be a "
            f"JWT that is valid now, for the audience {AUDIENCE}, with iss, sub, iat and exp. "
            f"{_OF_IDENTITY}"
        ) from None
    return token


def signer_of(signature: Path) -> Signer:
    """Who the certificate of a signature names; not checked here.

    Raises:
        SignatureError: the signature has no certificate of Sigstore's kind.
    """
    from cryptography import x509
    from sigstore.models import Bundle

    try:
        found = Bundle.from_json(signature.read_bytes()).signing_certificate.extensions
        names = found.get_extension_for_class(x509.SubjectAlternativeName).value
        identity = next(str(name.value) for name in names)
        issuer = found.get_extension_for_oid(x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")).value
        assert isinstance(issuer, x509.UnrecognizedExtension)
        return Signer(printable(identity), printable(issuer.value.decode()))
    except Exception as error:
        raise SignatureError(f"{signature} names no signer: {words(error)}.") from error


def within(call: Callable[[], T], whom: str) -> T:
    """Makes a call that asks the network, which may be silent or speak without end.

    Raises:
        SignatureError: the call did not end in two minutes.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    # The libraries set no limits of their own; a thread that hangs ends with the process.
    thread = threading.Thread(target=run, name="sigstore", daemon=True)
    with _quiet():
        thread.start()
        thread.join(_PATIENCE)
    if thread.is_alive():
        raise SignatureError(
            f"{whom} did not answer in {_PATIENCE:.0f} seconds. Check the network, then run this "
            "again."
        )
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the libraries' log lines and warnings off the terminal: what matters is raised."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def words(error: BaseException) -> str:
    """What a library says of a fault, and what the one that asked the network said to it."""
    texts: list[str] = []
    seen: BaseException | None = error
    while seen is not None and len(texts) < 2:
        text = " ".join(str(seen).split())
        if text and not any(text in other for other in texts):
            texts.append(text)
        seen = seen.__cause__ or seen.__context__
    text = _UNREACHED.sub(r"\1 cannot be reached", ": ".join(texts))
    said = without_secrets(text, None) or type(error).__name__
    return printable(said, _SHOWN).rstrip(".")


def is_of_network(error: BaseException) -> bool:
    """Whether Sigstore was not reached, or did not do its part."""
    kinds = {kind.__name__ for each in _chain(error) for kind in type(each).__mro__}
    return bool(
        kinds
        & {
            "FulcioClientError",
            "RekorClientError",
            "NetworkError",
            "IssuerError",
            "TUFError",
            "RequestException",
        }
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def configure_signer(config: Any, token: str, instance: Instance) -> None:
    """Lets model-signing sign as the identity of a token."""
    config.use_sigstore_signer(
        identity_token=token, use_staging=instance.staging, trust_config=instance.trust
    )


def configure_verifier(config: Any, signer: Signer, instance: Instance) -> None:
    """Lets model-signing check that a signer signed."""
    config.use_sigstore_verifier(
        identity=signer.identity,
        oidc_issuer=signer.issuer,
        use_staging=instance.staging,
        trust_config=instance.trust,
    )
