"""The client's other route: Xet, with a store in a folder that hf_xet itself writes and reads."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build

from tests.support.hub_server import TOKEN, HubServer, XetStore
from tests.support.hub_worker import Worker
from tests.support.tiny import content_of, copy_of

hf_xet = pytest.importorskip("hf_xet")  # huggingface_hub asks for it on most machines, not all

REPO = "me/tiny-nf4"
BY_XET = {"HF_HUB_DISABLE_XET": "0", "TESTS_XET_STORE": "folder"}


@pytest.fixture
def store(hub: HubServer, verified: Path, tmp_path: Path) -> XetStore:
    """An empty store, for the weights of the export."""
    (tmp_path / "cas").mkdir()
    paths = sorted((verified / "export").glob("*.safetensors"))
    hashes, content = {}, {}
    for path, found in zip(paths, hf_xet.hash_files([str(path) for path in paths]), strict=True):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        hashes[sha256], content[sha256] = found.hash, path.read_bytes()
    hub.xet = XetStore(f"local://{tmp_path / 'cas'}", hashes, content)
    return hub.xet


@pytest.mark.parametrize("pull_request", [False, True], ids=["main", "pull-request"])
def test_round_trip_by_xet(
    hub: HubServer, store: XetStore, verified: Path, tmp_path: Path, pull_request: bool
) -> None:
    build = Build(copy_of(verified, tmp_path / "build"))
    if pull_request:
        hub.store.add(REPO, {"a": b"a"})
    with Worker(tmp_path / "mine", hub.url, HF_TOKEN=TOKEN, **BY_XET) as worker:
        outcome = worker.push(build.root, REPO, private=False, pull_request=pull_request)
        assert outcome.error == "", outcome.message
        assert worker.push(build.root, REPO, pull_request=pull_request).value["committed"] is False
    assert hub.count("GET", "*/xet-write-token/*") > 0
    assert hub.count("POST", "*/objects/batch") == hub.count("PUT", "*") == 0
    assert hub.count("POST", "/api/models/*/commit/*") == 1

    revision = outcome.value["branch"]
    with Worker(tmp_path / "stranger", hub.url, **BY_XET) as stranger:
        fetched = stranger.download(REPO, revision)
    assert fetched.error == "", fetched.message
    export = content_of(build.export)
    found = {path: digest for path, digest in fetched.value["sha256"].items() if path in export}
    assert found == {path: hashlib.sha256(data).hexdigest() for path, data in export.items()}
    assert hub.count("GET", "*/xet-read-token/*") > 0
    assert hub.count("GET", "*.safetensors", cdn=True) == 0  # the bytes came from the store


def test_a_folder_is_no_store_that_a_hub_may_name(
    hub: HubServer, store: XetStore, verified: Path, tmp_path: Path
) -> None:
    """hf_xet takes `local://` from anybody, and writes there."""
    build = Build(copy_of(verified, tmp_path / "build"))
    with Worker(tmp_path / "mine", hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="0") as worker:
        outcome = worker.push(build.root, REPO, private=False)
    assert outcome.error == "HubError"
    assert "as the store of its files" in outcome.message
    assert list((tmp_path / "cas").iterdir()) == []


def test_the_store_that_was_checked_is_the_one_that_is_used(
    hub: HubServer, store: XetStore, verified: Path, tmp_path: Path
) -> None:
    """The Hub tells hf_xet itself about another one."""
    (tmp_path / "other").mkdir()
    store.url_in_body = f"local://{tmp_path / 'other'}"
    build = Build(copy_of(verified, tmp_path / "build"))
    with Worker(tmp_path / "mine", hub.url, HF_TOKEN=TOKEN, **BY_XET) as worker:
        outcome = worker.push(build.root, REPO, private=False)
    assert outcome.error == "", outcome.message
    assert list((tmp_path / "cas").iterdir()) != []
    assert list((tmp_path / "other").iterdir()) == []
