"""Stores of each kind that tests use, by name: what a URL may lead to."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from unittest.mock import patch

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.object_store import ObjectStore
from nf4_pipeline.records import QUANTIZE, SERIALIZE

from tests.support.s3_server import S3Server, s3_server

KINDS: Final = ("memory", "file", "s3")


@contextmanager
def served(folder: Path, pause: float = 0.0) -> Iterator[S3Server]:
    """A server of S3 that clients of this process, and of those that it starts, talk to."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    folder.mkdir(parents=True, exist_ok=True)
    with s3_server(folder, pause) as server, patch.dict(os.environ, server.env):
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


def hashes(build: Build) -> dict[str, str]:
    """Name -> sha256 of what quantize and serialize left."""
    return {
        name: digest.sha256
        for kind in (QUANTIZE, SERIALIZE)
        for name, digest in build.need(kind).outputs.items()
    }


def check_published(url: str, whole: dict[str, str]) -> None:
    """What stands at the URL: every file that its records speak of, as they say, and no other."""
    store = ObjectStore(url)
    facts = {f"{name}.facts.json" for name in whole if name.startswith("quantized/")}
    records = {"records/quantize.json", "records/serialize.json"}
    assert store.names().keys() == {"build.json", *whole, *facts, *records}
    contents = {name: store.read(name, 2**30) or b"" for name in (*whole, *records)}
    recorded = {
        name: entry["sha256"]
        for record in records
        for name, entry in json.loads(contents.pop(record))["outputs"].items()
    }
    assert recorded == whole
    assert {name: FileDigest.of(content).sha256 for name, content in contents.items()} == whole
