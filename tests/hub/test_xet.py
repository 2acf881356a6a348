"""The client's other route: Xet, with a store in a folder that hf_xet itself writes and reads."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.job import run_stage
from nf4_pipeline.processes.in_process import in_process
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import DOWNLOAD, QUANTIZE

from tests.support.hub_server import TOKEN, HubServer, XetStore
from tests.support.hub_worker import Worker
from tests.support.jobs import CPU, download
from tests.support.tiny import content_of, copy_of

hf_xet = pytest.importorskip("hf_xet")  # huggingface_hub asks for it on most machines, not all

REPO = "me/tiny-nf4"
BY_XET = {"HF_HUB_DISABLE_XET": "0", "TESTS_XET_STORE": "folder"}


@pytest.fixture
def store(hub: HubServer, verified: Path, tmp_path: Path) -> XetStore:
    """An empty store, for the weights of the export."""
    return make_store(hub, verified / "export", tmp_path)


def make_store(hub: HubServer, folder: Path, tmp_path: Path) -> XetStore:
    """An empty store, for the weights of a folder."""
    (tmp_path / "cas").mkdir()
    paths = sorted(folder.glob("*.safetensors"))
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


def test_a_source_is_streamed_by_xet(hub: HubServer, tiny_falcon: Path, tmp_path: Path) -> None:
    """Stretches come by plain requests, which the Hub answers for such files, too."""
    make_store(hub, tiny_falcon, tmp_path)
    with Worker(tmp_path / "mine", hub.url, HF_TOKEN=TOKEN, **BY_XET) as worker:
        assert worker.publish(tiny_falcon, "me/tiny", private=False).error == ""
    before = len(hub.seen)
    home = tmp_path / "stranger"
    with Worker(home, hub.url, **BY_XET) as stranger:
        for stage in (["download", "me/tiny", "--stream-source"], ["quantize"]):
            done = stranger.nf4(tmp_path, *stage, "--build-dir", "build", "-q")
            assert done.status == 0, done.err
    asked = hub.seen[before:]
    weights = [seen for seen in asked if seen.cdn and seen.path.endswith(".safetensors")]
    assert weights
    assert all(seen.range for seen in weights)
    build = Build(tmp_path / "build")
    assert build.need(DOWNLOAD).facts.streamed is not None
    assert not (build.root / "streamed" / "spool").exists()
    kept = sum(path.stat().st_size for path in home.rglob("*") if path.is_file())
    assert kept < min(path.stat().st_size for path in tiny_falcon.glob("*.safetensors"))
    with in_process():
        local, *_ = download(tiny_falcon, tmp_path / "artifacts")
        run_stage(local, "quantize", Recipe(), CPU, SILENT)
    assert build.need(QUANTIZE).outputs == local.need(QUANTIZE).outputs
