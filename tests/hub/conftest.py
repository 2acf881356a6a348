"""A Hub that takes uploads, and a process that makes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import hub_uploads
from tests.support.hub_server import TOKEN, HubServer
from tests.support.hub_worker import Worker

assert hub_uploads  # its routes are registered by importing it


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.store.users[TOKEN] = "me"
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty HF_HOME."""
    return tmp_path / "hf"


@pytest.fixture
def worker(hub: HubServer, home: Path) -> Iterator[Worker]:
    """A process with a token that may write; it takes a silence of six seconds for the end."""
    with Worker(home, hub.url, HF_TOKEN=TOKEN, HF_HUB_DOWNLOAD_TIMEOUT="1") as process:
        yield process
