"""A verified build to publish, and a Hub that takes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.job import run_build
from pipeline.progress import SILENT
from pipeline.recipe import load_recipe
from pipeline.stages import Settings
from tests.support import hub_uploads
from tests.support.hub_server import HubServer
from tests.support.hub_worker import Worker

TOKEN = "hf_RecognizableTokenOfTheTests"

assert hub_uploads  # its routes are registered by importing it


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.store.users[TOKEN] = "me"
        yield server


@pytest.fixture(scope="session")
def verified(
    tiny_falcon: Path, quick_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A build whose verdict is "pass" (see `copy_of`)."""
    settings = Settings(recipe=load_recipe(quick_recipe), device="cpu")
    folder = tmp_path_factory.mktemp("verified")
    build, results = run_build(str(tiny_falcon), folder, settings, SILENT)
    assert results["verify"].record.facts["verdict"] == "pass"
    return build.root


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty HF_HOME."""
    return tmp_path / "hf"


@pytest.fixture
def worker(hub: HubServer, home: Path) -> Iterator[Worker]:
    """A process with a token that may write; it takes a silence of six seconds for the end."""
    with Worker(home, hub.url, HF_TOKEN=TOKEN, HF_HUB_DOWNLOAD_TIMEOUT="1") as process:
        yield process
