"""OpenSSF model signing, with a key file or an identity: one signature over all of an artifact.

Which files count is fixed here, so that nothing can be added to a signed artifact unseen: all but
the signature itself, and what git and the Hub client put beside a download.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from contextlib import redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.atomic import write_bytes
from nf4_pipeline.checkpoint.plain_file import check_plain, read_beginning
from nf4_pipeline.errors import ArtifactError, SignatureError, UsageError
from nf4_pipeline.manifest.read import MANIFEST_FILE
from nf4_pipeline.near_names import did_you_mean
from nf4_pipeline.printable import printable
from nf4_pipeline.processes.temporary import TemporaryFolder
from nf4_pipeline.provenance import keyless
from nf4_pipeline.provenance.keyless import Instance, Signer

SIGNATURE_FILE: Final = "model.sig"
_LARGEST_SIGNATURE: Final = 64 * 2**20  # bytes; it names every file
_LARGEST_KEY: Final = 2**16
_SHOWN: Final = 1_000  # characters of what the library says

_OTHER: Final = re.compile(r"Hash mismatch for \\*'(.+?)\\*': Expected")
_ADDED: Final = re.compile(r"Extra files found in model '.*?': ([^'\"\]]+)")
_MISSING: Final = re.compile(r"Missing files in model '.*?': ([^'\"\]]+)")
_SIGNER: Final = re.compile(r"SANs do not match (.*); actual SANs: \{?(.*?)\}?$")
_FORM: Final = re.compile(r"validation errors? for \w+ (\S+) (.+?) \[type=")
_ISSUER: Final = re.compile(r"OIDCIssuer does not match \(got '(.*)', expected '(.*)'\)")

NOT_SIGNED: Final = (SIGNATURE_FILE, ".git", ".gitattributes", ".cache/huggingface")
"""Paths in an artifact that no signature covers. No loader reads any of them."""


def sign(artifact: Path, private_key: Path, password: str | None = None) -> Path:
    """Signs every file of an artifact, and leaves the signature among them.

    Args:
        artifact: its folder.
        private_key: PEM file of an elliptic curve key (P-256, P-384 or P-521).
        password: of the key, if it has one.

    Returns:
        The signature's path.

    Raises:
        UsageError: model-signing is not installed, or the key cannot be used.
        ArtifactError: the folder has no manifest.
        SignatureError: the folder holds a symbolic link, a pipe or a device.
    """
    signing, _, hashing = _library()
    _check_artifact(artifact)
    _check_key(private_key, private=True)
    config = signing.Config()
    try:
        secret = password.encode() if password else None
        config.use_elliptic_key_signer(private_key=private_key, password=secret)
    except Exception as error:  # of the key's format, its password, or its curve
        new = shlex.quote(str(_free_name(private_key)))
        raise UsageError(
            f"{private_key} is no private key that can sign{_why_no_key(error)}; expected a PEM "
            "file of an elliptic curve key. Name another, or make one: openssl ecparam -name "
            f"prime256v1 -genkey -noout -out {new}"
        ) from error
    config.set_hashing_config(_Hashed(artifact, hashing))
    with TemporaryFolder("sign") as folder:
        fresh = folder / SIGNATURE_FILE
        config.sign(artifact, fresh)
        write_bytes(artifact / SIGNATURE_FILE, fresh.read_bytes())
    return artifact / SIGNATURE_FILE


def sign_keyless(artifact: Path, token: str | None, instance: Instance) -> Signer:
    """Signs every file of an artifact as who the identity token says, and leaves the signature.

    The signature is checked before it is left: a log or an authority that did not do its part would
    be found by nobody but those who download.

    Args:
        artifact: its folder.
        token: the identity token; None for that of this CI job.
        instance: the Sigstore to ask.

    Returns:
        Who signed, as everybody who checks has to name them.

    Raises:
        UsageError: model-signing is not installed, there is no identity token, it cannot be used,
            or the instance's file is none.
        ArtifactError: the folder has no manifest.
        SignatureError: the folder holds a symbolic link, a pipe or a device; or Sigstore does not
            answer, refuses the identity, or gives what does not check.
    """
    signing, verifying, hashing = _library()
    _check_artifact(artifact)
    instance.check()
    keyless.identity_token(token)  # before an hour of hashing
    hashed = _Hashed(artifact, hashing)
    hashed.hash(artifact)  # before the patience with the network begins
    with TemporaryFolder("sign") as folder:
        fresh = folder / SIGNATURE_FILE
        current = keyless.identity_token(token)  # CI's are good for minutes

        def make() -> Signer:
            config = signing.Config().set_hashing_config(hashed)
            keyless.configure_signer(config, current, instance)
            config.sign(artifact, fresh)
            signer = keyless.signer_of(fresh)
            checking = verifying.Config().set_hashing_config(hashed)
            keyless.configure_verifier(checking, signer, instance)
            checking.verify(artifact, fresh)
            return signer

        try:
            signer = keyless.within(make, str(instance))
        except SignatureError:
            raise
        except Exception as error:
            raise SignatureError(
                f"{artifact} was not signed: {instance} did not do its part: "
                f"{keyless.words(error)}. Check that it takes identities of this issuer, and the "
                "network; then run this again."
            ) from None
        write_bytes(artifact / SIGNATURE_FILE, fresh.read_bytes())
    return signer


def check(artifact: Path, public_key: Path) -> int:
    """Checks that every file of an artifact was signed with a key, and that there is no other.

    Args:
        artifact: its folder, with the signature in it.
        public_key: PEM file of the signer's public key.

    Returns:
        How many files the signature covers.

    Raises:
        SignatureError: the artifact is not signed, holds a symbolic link, a pipe or a device, or
            holds other files than those that were signed with that key.
        UsageError: model-signing is not installed, or the key cannot be used.
    """
    _, verifying, hashing = _library()
    path = _signature(artifact)
    _check_key(public_key, private=False)
    config = verifying.Config()
    try:
        config.use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:
        raise UsageError(_no_public_key(public_key, error)) from error
    hashed = _Hashed(artifact, hashing)
    config.set_hashing_config(hashed)
    try:
        with redirect_stdout(io.StringIO()):  # the library prints about old formats
            config.verify(artifact, path)
    except SignatureError:
        raise
    except Exception as error:  # what a stranger's signature makes the library raise is open
        raise SignatureError(
            f"{artifact} is not what was signed with that key: {_words(error)}. "
            f"{_hint(path, has_key=True)}Do not use it; get it again from where its maker "
            "published it."
        ) from error
    return hashed.count()


def check_identity(artifact: Path, signer: Signer, instance: Instance) -> int:
    """Checks that every file of an artifact was signed by somebody, and that there is no other.

    Args:
        artifact: its folder, with the signature in it.
        signer: who must have signed, to the letter.
        instance: the Sigstore that vouches for them.

    Returns:
        How many files the signature covers.

    Raises:
        SignatureError: the artifact is not signed, holds a symbolic link, a pipe or a device, or
            holds other files than those that the signer signed; or what says whom to trust cannot
            be had of Sigstore.
        UsageError: model-signing is not installed, the signer is not named in full, or the
            instance's file is none.
    """
    _, verifying, hashing = _library()
    if not (signer.identity.strip() and signer.issuer.strip()):  # who is left out is not checked
        raise UsageError("--identity and --issuer must both say who signed: one of them is empty.")
    path = _signature(artifact)
    instance.check()
    hashed = _Hashed(artifact, hashing)
    hashed.hash(artifact)  # before the patience with the network begins

    def verify() -> None:
        config = verifying.Config().set_hashing_config(hashed)
        keyless.configure_verifier(config, signer, instance)
        with redirect_stdout(io.StringIO()):
            config.verify(artifact, path)

    try:
        keyless.within(verify, str(instance))
    except SignatureError:
        raise
    except Exception as error:  # what a stranger's signature makes the library raise is open
        if keyless.is_of_network(error):
            raise SignatureError(
                f"{artifact} could not be checked: what says whom to trust cannot be had of "
                f"{instance}: {keyless.words(error)}. Check the network, or name a file with "
                "--trust-config, which asks nobody."
            ) from None
        raise SignatureError(
            f"{artifact} is not what {printable(signer.identity)} signed: {_words(error)}. "
            f"{_hint(path, has_key=False)}Do not use it; get it again from where its maker "
            "published it."
        ) from None
    return hashed.count()


class _Hashed:
    """The files of an artifact, hashed once, in the place of the library's way to hash.

    They are hashed when that is first asked for; the library asks once a signature is one and was
    made with the key. A signature may name paths that it leaves out: here nothing is left out but
    `NOT_SIGNED`.
    """

    def __init__(self, artifact: Path, hashing: Any) -> None:
        self._artifact = artifact
        self._config = hashing.Config().use_file_serialization(hashing_algorithm="sha256")
        self._config.set_ignored_paths(paths=NOT_SIGNED, ignore_git_paths=False)

    @cached_property
    def _manifest(self) -> Any:
        try:
            return self._config.hash(self._artifact)
        except OSError as error:
            raise SignatureError(
                f"{error.filename or self._artifact} cannot be read: {error.strerror}. Let your "
                "user read every file of the artifact, then run this again."
            ) from error

    def hash(self, _: Path, **__: Any) -> Any:
        """The library's manifest of all files.

        Raises:
            SignatureError: a file cannot be read.
        """
        return self._manifest

    def add_ignored_paths(self, **_: Any) -> None:
        """What the signer would leave out is not left out."""

    def count(self) -> int:
        """How many files were hashed.

        Raises:
            SignatureError: no file was hashed, or the artifact holds other files than were hashed.
        """
        names = {item.identifier for item in self._manifest.resource_descriptors()}
        there = {path.relative_to(self._artifact).as_posix() for path in _files(self._artifact)}
        if not names or names != there:
            changed = ", ".join(sorted(names ^ there)[:3]) or "there is none"
            raise SignatureError(
                f"{self._artifact} holds other files than those that were checked: {changed}. Let "
                "whatever writes there end, then run this again."
            )
        return len(names)


def _check_artifact(artifact: Path) -> None:
    if not (artifact / MANIFEST_FILE).is_file():
        raise ArtifactError(
            f"{artifact} has no {MANIFEST_FILE}, so it is not an artifact of this pipeline. "
            "Name the export/ folder of a build."
        )
    _refuse_all_but_files(artifact)


def _signature(artifact: Path) -> Path:
    _refuse_all_but_files(artifact)
    path = artifact / SIGNATURE_FILE
    if not path.is_file():
        raise SignatureError(
            f"{artifact} has no signature: there is no {SIGNATURE_FILE} in it. Without it, "
            f"compare every byte: nf4 reproduce {shlex.quote(str(artifact))}. If you made it, sign "
            f"it with your private key: nf4 sign {shlex.quote(str(artifact))} --key my-key.pem"
        )
    try:
        check_plain(path, _LARGEST_SIGNATURE)
    except OSError as error:
        raise SignatureError(f"{path} is no signature: {error.strerror}.") from error
    return path


def _hint(signature: Path, *, has_key: bool) -> str:
    """Says so if it is a signature of the other kind."""
    try:
        material = json.loads(signature.read_bytes())["verificationMaterial"]
        of_identity = "certificate" in material
        of_key = "publicKey" in material
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    if has_key and of_identity:
        return "It was signed without a key: see --identity and --issuer. "
    if not has_key and of_key:
        return "It was signed with a key: see --key. "
    return ""


def _files(artifact: Path) -> list[Path]:
    """Those that a signature covers."""
    ignored = [artifact / name for name in NOT_SIGNED]
    return [
        path
        for path in artifact.rglob("*")
        if path.is_file() and not any(path.is_relative_to(other) for other in ignored)
    ]


def _check_key(path: Path, *, private: bool) -> None:
    """The library reads a key whole, whatever it is."""
    try:
        check_plain(path, _LARGEST_KEY)
    except OSError as error:
        beside = _files_beside(path)
        keys = [name for name in beside if _is_private(path.with_name(name)) == private]
        near = did_you_mean(path.name, keys, f"{path.parent}/" * ("/" in str(path)))
        raise UsageError(
            f"The key {path} cannot be read: {error.strerror} (looked in {path.absolute().parent})."
            f"{near or ' Correct the path.'}"
        ) from error


def _why_no_key(error: Exception) -> str:
    """What a library says of a key, in brackets; nothing of what is only for programmers."""
    text = _words(error)
    if "password" in text.lower() or "decrypt" in text.lower():
        return f" ({text})"
    return "" if "PEM" in text or "deserialize" in text else f" ({text})"


def _free_name(key: Path, stem: str = "my-key") -> Path:
    """A name beside a key that no file has, so that no key is written over."""
    names = (f"{stem}{number}.pem" for number in ("", *range(2, 1000)))
    return next(path for name in names if not (path := key.with_name(name)).exists())


def _is_private(path: Path) -> bool:
    try:
        return b"PRIVATE KEY" in read_beginning(path, _LARGEST_KEY)
    except OSError:
        return False


def _files_beside(path: Path) -> list[str]:
    try:
        return [other.name for other in path.parent.iterdir() if other.is_file()]
    except OSError:
        return []


def _no_public_key(path: Path, error: Exception) -> str:
    """The message for a file that is no public key; of a private one, how to take it from that."""
    if _is_private(path):
        public = _free_name(path, f"{path.stem}-public")
        made = f"openssl ec -in {shlex.quote(str(path))} -pubout -out {shlex.quote(str(public))}"
        return (
            f"{path} is a private key, and a signature is checked with a public one. Make it of "
            f"that: {made}"
        )
    return (
        f"{path} is no public key that can check a signature{_why_no_key(error)}; expected a PEM "
        'file that begins with "-----BEGIN PUBLIC KEY-----". Its signer publishes it.'
    )


def _refuse_all_but_files(artifact: Path) -> None:
    """What a link points at can change while the artifact does not; a pipe would be waited for."""
    for path in artifact.rglob("*"):
        if path.is_symlink():
            raise SignatureError(
                f"{path} is a symbolic link, which no signature covers. Download the artifact into "
                "a folder of its own: hf download ORG/NAME --local-dir DIR."
            )
        if not path.is_dir() and not path.is_file():
            raise SignatureError(
                f"{path} is neither a file nor a folder; no artifact has such. Remove it."
            )


def _library() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise UsageError(
            "Signatures need the package model-signing, which is not installed: "
            "pip install 'nf4-pipeline[sign]'"
        ) from error
    return signing, verifying, hashing


def _words(error: Exception) -> str:
    """What the library says; of files that differ, their names without the digests."""
    text = " ".join(str(error).split())
    said = [f"{name} has other bytes" for name in _OTHER.findall(text)]
    said += [f"{names} was added" for names in _ADDED.findall(text)]
    said += [f"{names} is missing" for names in _MISSING.findall(text)]
    said += [f"{found} signed it, not {asked}" for asked, found in _SIGNER.findall(text)]
    said += [
        f"{found} vouches for its signer, not {asked}" for found, asked in _ISSUER.findall(text)
    ]
    said += [f"it is no signature: {place}: {what}" for place, what in _FORM.findall(text)]
    if not said and "Digest(" in text:  # raw bytes, which are for no reader
        return "its files are not those that were signed"
    return printable("; ".join(said) or text.rstrip("."), _SHOWN) or type(error).__name__
