"""A URL -> the file system that it names, or why there is none."""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import urlsplit

from nf4_pipeline.errors import UsageError

S3: Final = ("s3", "s3a")
_EXTRA: Final = {"s3": "nf4-pipeline[s3]", "s3a": "nf4-pipeline[s3]"}
"""Protocols whose client is an extra of this package."""

_KNOWN: Final = {*S3, "gs", "gcs", "abfs", "az", "sftp", "smb", "file", "memory"}
_PACKAGE: Final = re.compile(r'nstall (\w+) |requires "(\w+)"')
"""How fsspec says which package a protocol needs."""

_OBJECT_STORES: Final = {
    *S3,
    *("gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "tos"),
}
"""Where an object is seen only once all of its bytes have come. Elsewhere it gets its name then."""

_REFUSED: Final = {
    "hf": "a repo of the Hub is written by `nf4 push`, in one commit",
    "http": "it can be read only",
    "https": "it can be read only",
    "data": "it can be read only",
    "github": "it can be read only",
}


def check_url(url: str) -> str:
    """The URL of a folder as it is kept: without a slash at its end.

    Raises:
        UsageError: no build can be kept there, whatever is installed.
    """
    protocol, _, path = url.partition("://")
    shown = repr(url[:200])
    if "::" in url:
        raise UsageError(f"{shown}: URLs in each other are not supported. Name one of them.")
    if not url.isprintable() or url != url.strip():
        raise UsageError(
            f"{shown} can be no URL of a folder: there is a control in it, or a blank at its end."
        )
    if not path.strip("/"):
        raise UsageError(
            f"{shown} names no folder. Write: {protocol}://BUCKET/FOLDER, with a bucket and a "
            "folder of yours."
        )
    if protocol.lower() == "file" and not path.startswith("/"):
        raise UsageError(f"{shown} has no absolute path. Write: file:///{path.lstrip('/')[:200]}")
    if set("*?[]") & set(path):
        raise UsageError(f"{shown}: clients take * ? [ ] for patterns. Name a folder without them.")
    if {".", ".."} & set(path.split("/")):
        raise UsageError(f"{shown}: a folder cannot be called . or .. there. Name it in full.")
    try:
        parts = urlsplit(url)
        has_password = parts.password is not None
    except ValueError as error:
        raise UsageError(f"{shown} can be no URL: {error}.") from error
    if has_password:
        raise UsageError(
            "The URL of --build-dir holds a password, and would be kept in the build folder. Leave "
            "it out; clients find their credentials in files or variables of their own."
        )
    if why := _REFUSED.get(protocol.lower()):
        raise UsageError(f"{shown}: no build can be kept there: {why}.")
    return f"{protocol.lower()}://{path.rstrip('/')}"


def check_path(path: str) -> None:
    """Refuses a path that was to be a URL, and would become a folder called "s3:".

    Raises:
        UsageError: a slash is missing.
    """
    protocol, colon, rest = path.partition(":")
    slip = rest.startswith("/") and not rest.startswith("//")
    if colon and slip and protocol.lower() in _KNOWN:
        meant = rest if protocol.lower() == "file" else rest[1:]
        raise UsageError(f"{path[:200]!r}: a slash is missing. Write: {protocol}://{meant[:200]}")


def open_filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the folder in it.

    Raises:
        UsageError: nobody knows the protocol, or the package for it is not installed.
    """
    from fsspec.core import url_to_fs
    from fsspec.registry import get_filesystem_class, known_implementations

    protocol = url.partition("://")[0]
    try:
        get_filesystem_class(protocol)
    except ValueError as error:
        raise UsageError(
            f"{url}: fsspec knows no protocol {protocol!r}. It knows s3, gs, abfs, sftp, file and "
            "others."
        ) from error
    except ImportError as error:
        said = str(known_implementations.get(protocol, {}).get("err", error)).rstrip(".")
        named = _PACKAGE.search(said)
        name = _EXTRA.get(protocol) or (named and (named[1] or named[2]))
        how = f"Install it: pip install '{name}'" if name else said
        raise UsageError(
            f"{url}: the package for {protocol}:// is not installed. {how}."
        ) from error
    # One client keeps no listings: others write there, too.
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in S3:  # one place decides how often is tried: `store`
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}
    filesystem, folder = url_to_fs(url, **options)
    if protocol in S3:
        filesystem.retries = 1
    return filesystem, folder.rstrip("/")


def protocols(filesystem: Any) -> set[str]:
    """The protocols of a file system."""
    own = filesystem.protocol
    return {own} if isinstance(own, str) else set(own)


def is_object_store(filesystem: Any) -> bool:
    """Whether an object is seen there only once all of its bytes have come."""
    return bool(protocols(filesystem) & _OBJECT_STORES)
