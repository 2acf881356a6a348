"""Stores of each kind that tests use, by name: what a URL may lead to."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from unittest.mock import patch

import pytest

from tests.support.s3_server import S3Server, s3_server

KINDS: Final = ("memory", "file", "s3")


@contextmanager
def served(folder: Path) -> Iterator[S3Server]:
    """A server of S3 that clients of this process, and of those that it starts, talk to."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    folder.mkdir(parents=True, exist_ok=True)
    with s3_server(folder) as server, patch.dict(os.environ, server.env):
        forget_clients()
        server.make_bucket("bucket")
        yield server
    forget_clients()


def forget_clients() -> None:
    """Clients made with what the environment says are not used again."""
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()


def fresh_url(kind: str, folder: Path) -> str:
    """The URL of an empty folder in a store of a kind; one in S3 must be `served`.

    Args:
        kind: one of `KINDS`.
        folder: of this machine, that may be used.
    """
    name = uuid.uuid4().hex[:8]
    return {
        "memory": f"memory://tests/{name}",
        "file": f"file://{folder}/store-{name}",
        "s3": f"s3://bucket/runs/{name}",
    }[kind]
