"""A build whose source stays on the Hub: the same bytes, little disk, nothing fetched for nothing."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.job import run_stage
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import DOWNLOAD, QUANTIZE, SERIALIZE, VERIFY
from nf4_pipeline.stages.forecast import Forecast

from tests.support.hub_server import TOKEN, Fault, HubServer
from tests.support.hub_worker import Worker
from tests.support.jobs import CPU, download
from tests.support.tiny import Done, edit_json, write_falcon

pytestmark = pytest.mark.usefixtures("workers_here")

SHARDS = 8


@dataclass
class Streamed:
    """A Hub with a model, and a process that builds from it, each time in a folder of its own."""

    hub: HubServer
    worker: Worker
    model: Path
    folder: Path
    recipe: Path
    home: Path = field(init=False)

    def __post_init__(self) -> None:
        self.home = self.folder.parent / "hf"

    @property
    def build(self) -> Build:
        return Build(self.folder / "build")

    @property
    def shards(self) -> list[str]:
        return sorted(path.name for path in self.model.glob("*.safetensors"))

    def nf4(self, *args: str | Path) -> Done:
        return self.worker.nf4(self.folder, *args)

    def run(self, *stages: str) -> None:
        """The stages of one build; each of them ends well."""
        for stage in stages:
            args = ["me/tiny", "--stream-source"] if stage in ("download", "build") else []
            done = self.nf4(stage, *args, "--build-dir", "build", "-q")
            assert done.status == 0, done.err

    def fetched(self, since: int = 0) -> Counter[str]:
        """How often the body of each shard was sent, whole or a part of it."""
        return Counter(
            seen.path.rpartition("/")[2]
            for seen in self.hub.seen[since:]
            if seen.method == "GET" and seen.cdn and seen.path.endswith(".safetensors")
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_falcon(tmp_path_factory.mktemp("streamed") / "model", layers=3, shards=SHARDS)


@pytest.fixture(scope="module")
def ordinary(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileDigest]:
    """What stands in quantized/ of a build whose source lies here."""
    build, *_ = download(model, tmp_path_factory.mktemp("ordinary"))
    run_stage(build, "quantize", Recipe(), CPU, SILENT)
    return build.need(QUANTIZE).outputs


@pytest.fixture(scope="module")
def process(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[HubServer, Worker]]:
    with HubServer() as server:
        home = tmp_path_factory.mktemp("streaming") / "hf"
        server.store.users[TOKEN] = "me"
        with Worker(home, server.url, HF_TOKEN=TOKEN, HF_HUB_DOWNLOAD_TIMEOUT="1") as worker:
            yield server, worker


@pytest.fixture
def streamed(
    process: tuple[HubServer, Worker], model: Path, tmp_path: Path, quick_recipe: Path
) -> Iterator[Streamed]:
    hub, worker = process
    hub.store.add("me/tiny", model)
    yield Streamed(hub, worker, model, tmp_path, quick_recipe)
    hub.faults.clear()
    hub.pause = 0.0


@dataclass
class Peak:
    """The most bytes that were seen in a folder, and in each part of it that was asked for."""

    total: int = 0
    spool: int = 0
    samples: int = 0


@contextmanager
def watched(build: Build) -> Iterator[Peak]:
    """Samples the disk that a build takes, hard links once, until the body ends."""
    peak, stop = Peak(), threading.Event()

    def sample() -> None:
        sizes: dict[int, int] = {}
        spool = 0
        for folder, _, names in os.walk(build.root):
            for name in names:
                try:
                    found = os.lstat(os.path.join(folder, name))
                except FileNotFoundError:
                    continue
                sizes[found.st_ino] = found.st_blocks * 512
                if "/spool/" in folder and "/blobs" in folder:
                    spool += found.st_size
        peak.total = max(peak.total, sum(sizes.values()))
        peak.spool = max(peak.spool, spool)
        peak.samples += 1

    def repeat() -> None:
        while not stop.is_set():
            sample()
            time.sleep(0.001)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        sample()


def test_a_whole_build_takes_no_more_disk_than_promised(
    streamed: Streamed, ordinary: dict[str, FileDigest]
) -> None:
    """Same hashes; fidelity measured, each byte of a block fetched once; then nothing is done."""
    options = ["me/tiny", "--stream-source", "--build-dir", "build", "--recipe", streamed.recipe]
    done = streamed.nf4("build", *options, "--dry-run", "--json")
    promise = Forecast.from_json(done.value)
    streamed.hub.pause = 0.002
    before = len(streamed.hub.seen)
    with watched(streamed.build) as peak:
        done = streamed.nf4("build", *options, "--json")
    assert done.status == 0, done.err
    assert peak.samples > 20
    assert 0 < peak.spool <= promise.window_bytes < promise.source_bytes
    assert peak.total <= promise.builds.needed
    build = streamed.build
    assert build.need(QUANTIZE).outputs == ordinary
    verification = build.need(VERIFY).facts
    assert verification.verdict == "pass"
    assert "perplexity" in done.out
    sizes = {path.name: path.stat().st_size for path in streamed.model.glob("*.safetensors")}
    assert promise.fetch_bytes == 2 * sum(sizes.values())
    assert not list(build.root.glob("streamed/spool"))
    cached = [path for path in streamed.home.rglob("*") if path.is_file()]
    assert not any(path.stat().st_size in sizes.values() for path in cached)
    # Whole, once; then parts of it: each stretch once, but for what no block holds.
    fetched = streamed.fetched(before)
    passed = {
        name: json.loads((build.root / f"streamed/passed/{name}.json").read_text())
        for name in streamed.shards
    }
    headers = 1
    for name in streamed.shards[1:-1]:
        assert fetched[name] == headers + 1 + len(passed[name]["stretches"])
    before = len(streamed.hub.seen)
    done = streamed.nf4("build", *options)
    assert done.status == 0, done.err
    assert "nothing had to be done" in done.out
    assert not streamed.fetched(before)
    status = streamed.nf4("status", "--build-dir", "build").out
    assert "GB of weights stay on the Hub" in status
    assert status.count(" done ") == 5
    os.utime(build.quantized / next(iter(ordinary)).rpartition("/")[2])
    streamed.run("quantize", "serialize")  # what is there is hashed, and nothing is fetched
    assert not streamed.fetched(before)


def test_what_is_finished_is_not_fetched_again(
    streamed: Streamed, ordinary: dict[str, FileDigest]
) -> None:
    """The Hub refuses one file after the other; each run goes on where the last one ended."""
    streamed.run("download")
    assert not any(path.is_file() for path in streamed.build.source.glob("*.safetensors"))
    shards = streamed.shards
    for number in (2, 3, len(shards) - 1):
        before = len(streamed.hub.seen)
        streamed.hub.faults.append(Fault(f"*/{shards[number]}", times=9, status=403))
        done = streamed.nf4("quantize", "--build-dir", "build")
        streamed.hub.faults.clear()
        assert done.status == 1
        assert shards[number] in done.err
        again = {
            name
            for name in streamed.fetched(before)
            if (streamed.build.quantized / f"{name}.facts.json").is_file()
        }
        assert again == set(streamed.fetched(before))  # what came is finished
        finished = set(again)
    before = len(streamed.hub.seen)
    streamed.run("quantize", "serialize")
    assert streamed.fetched(before).keys() == {shards[-1]}
    assert not finished & streamed.fetched(before).keys()
    assert streamed.build.need(QUANTIZE).outputs == ordinary
    assert not (streamed.build.root / "streamed" / "spool").exists()
    manifest = json.loads((streamed.build.export / "manifest.json").read_text())
    assert manifest["source"]["files"].keys() >= set(shards)
    assert streamed.build.record(SERIALIZE) is not None


def test_the_commit_is_pinned(streamed: Streamed, ordinary: dict[str, FileDigest]) -> None:
    """Somebody pushes other weights while the build fetches these."""
    repo = streamed.hub.store.repos["me/tiny"]
    pinned = repo.refs["main"]
    streamed.run("download")
    other = dict.fromkeys(streamed.shards, b"other weights")
    streamed.hub.before(f"*/{streamed.shards[3]}", lambda: repo.commit(other))
    streamed.run("quantize")
    assert repo.refs["main"] != pinned
    assert streamed.build.need(DOWNLOAD).facts.commit == pinned
    assert streamed.build.need(QUANTIZE).outputs == ordinary


@pytest.mark.parametrize("times", [1, 2])
def test_wrong_bytes_are_never_quantized(
    times: int, streamed: Streamed, ordinary: dict[str, FileDigest]
) -> None:
    """A file that came wrong is fetched again once, as by `nf4 download`."""
    streamed.run("download")
    name = streamed.shards[1]
    fault = Fault(f"*/{name}", times=times, cdn=True, method="GET", flip_bit=80_000)
    streamed.hub.faults.append(fault)
    done = streamed.nf4("quantize", "--build-dir", "build")
    assert fault.times == 0
    assert done.status == (0 if times == 1 else 1), done.err
    if times == 2:
        assert f"{name} of me/tiny" in done.err
        assert "came wrong twice" in done.err
        assert not (streamed.build.quantized / f"{name}.facts.json").exists()
        streamed.run("quantize")
    assert streamed.build.need(QUANTIZE).outputs == ordinary


def test_a_header_that_came_wrong(streamed: Streamed, ordinary: dict[str, FileDigest]) -> None:
    """It has no hash when the work is planned by it; the file that it should begin has one."""
    name = streamed.shards[2]
    whole = (streamed.model / name).read_bytes()
    place = whole.index(b'"format":"pt"') + len(b'"format":"')
    fault = Fault(f"*/{name}", cdn=True, method="GET", flip_bit=8 * place)
    streamed.hub.faults.append(fault)
    streamed.run("download")
    assert fault.times == 0
    done = streamed.nf4("quantize", "--build-dir", "build")
    assert done.status == 1
    assert "begins with another header" in done.err
    streamed.run("download", "quantize")
    assert streamed.build.need(QUANTIZE).outputs == ordinary


def test_tied_weights_that_differ_are_both_kept(
    process: tuple[HubServer, Worker], tmp_path: Path, quick_recipe: Path
) -> None:
    """They lie in different files, which are never here together."""
    from safetensors.torch import load_file, save_file

    model = write_falcon(tmp_path / "model", shards=4)
    last = max(model.glob("*.safetensors"))
    tensors = load_file(last)
    assert "lm_head.weight" in tensors
    tensors["lm_head.weight"] += 1
    save_file(tensors, last, metadata={"format": "pt"})
    build, *_ = download(model, tmp_path / "artifacts")
    run_stage(build, "quantize", Recipe(), CPU, SILENT)
    hub, worker = process
    hub.store.add("me/tiny", model)
    streamed = Streamed(hub, worker, model, tmp_path, quick_recipe)
    streamed.run("download", "quantize")
    assert streamed.build.need(QUANTIZE).outputs == build.need(QUANTIZE).outputs
    assert streamed.build.need(QUANTIZE).facts.untied == ("lm_head.weight",)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["build", "sample", "--stream-source"], "sample is here already"),
        (["build", "me/tiny", "--stream-source", "--offline"], "--offline asks nobody"),
        (["build", "me/tiny", "--stream-source", "--calibrate", "self"], "Leave --calibrate out"),
        (["build", "me/tiny", "--stream-source", "--allow-pickle"], "--allow-pickle converts"),
        (["build", "me/tiny", "--stream-source", "--strip-prefix", "m."], "--strip-prefix renames"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_streamed_is_said_at_once(
    args: list[str], why: str, streamed: Streamed
) -> None:
    before = len(streamed.hub.seen)
    done = streamed.nf4(*args)
    assert done.status == 2
    assert "--stream-source" in done.err
    assert why in done.err
    assert len(streamed.hub.seen) == before
    assert not list(streamed.folder.iterdir())


def test_of_a_folder(streamed: Streamed) -> None:
    done = streamed.nf4("download", streamed.model, "--stream-source")
    assert done.status == 2
    assert "is here already" in done.err


def test_what_reads_the_weights_more_than_once_is_refused(streamed: Streamed) -> None:
    streamed.run("download")
    done = streamed.nf4("quantize", "--build-dir", "build", "--part", "1/2")
    assert done.status == 2
    assert "Leave --part out" in done.err
    done = streamed.nf4("quantize", "--build-dir", "build", "--calibrate", "self", "--replace")
    assert done.status == 2
    assert "Leave --calibrate out" in done.err


def test_a_hub_that_lists_no_hash(streamed: Streamed) -> None:
    name = streamed.shards[1]
    streamed.hub.unhashed.add(name)
    try:
        options = ("--stream-source", "--allow-unhashed", "--build-dir", "build")
        done = streamed.nf4("download", "me/tiny", *options)
    finally:
        streamed.hub.unhashed.clear()
    assert done.status == 1
    assert f"lists no sha256 of {name}" in done.err
    assert "Leave --stream-source out" in done.err


def test_what_is_cached_is_not_streamed(
    streamed: Streamed, ordinary: dict[str, FileDigest]
) -> None:
    """And a build without the option has its source here."""
    streamed.run("download", "quantize")
    before = len(streamed.hub.seen)
    done = streamed.nf4("download", "me/tiny", "--build-dir", "build")
    assert done.status == 0, done.err
    assert streamed.fetched(before).keys() == set(streamed.shards)
    assert streamed.build.need(DOWNLOAD).facts.streamed is None
    before = len(streamed.hub.seen)
    streamed.run("quantize", "download")
    done = streamed.nf4("download", "me/tiny", "--stream-source", "--build-dir", "other", "--json")
    assert done.status == 0, done.err
    assert Build(streamed.folder / "other").need(DOWNLOAD).facts.streamed is None
    assert not streamed.fetched(before)
    assert streamed.build.need(QUANTIZE).outputs == ordinary
    for blob in streamed.home.glob("hub/models--me--tiny/snapshots/*/*.safetensors"):
        blob.resolve().unlink()
        blob.unlink()


def test_a_disk_that_is_full(streamed: Streamed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The promise counts the files of the source that lie there, too."""
    options = ("me/tiny", "--stream-source", "--build-dir", "build", "--dry-run")
    done = streamed.nf4("build", *options, "--json")
    found = Forecast.from_json(done.value)
    assert found.builds.needed > found.quantized_bytes + found.window_bytes
    assert found.hub_cache is not None
    assert found.hub_cache.needed == 0
    shown = streamed.nf4("build", *options).out
    assert re.search(r"of it for two files of the source at a time", shown)
    assert "streamed: fetched once to be quantized, and once more to verify" in shown


def test_the_hub_is_gone_when_it_is_verified(streamed: Streamed) -> None:
    """The verdict is made of bytes that come; without them there is none, and words say so."""
    streamed.run("download", "quantize", "serialize")
    streamed.hub.faults.append(Fault("*.safetensors", times=10**6, status=403))
    verify = ("verify", "--build-dir", "build", "--recipe", streamed.recipe)
    done = streamed.nf4(*verify)
    assert done.status == 1
    assert "streaming model-0000" in done.err
    assert streamed.build.record(VERIFY) is None
    streamed.hub.faults.clear()
    assert edit_json is not None
    name = streamed.shards[0]
    passed = streamed.build.root / f"streamed/passed/{name}.json"
    passed.unlink()  # what was known of a file is gone: it is fetched whole, and known again
    streamed.hub.faults.append(
        Fault(f"*/{streamed.shards[3]}", times=2, cdn=True, method="GET", flip_bit=99)
    )
    done = streamed.nf4(*verify)
    assert done.status == 1
    assert "came wrong twice" in done.err
    assert passed.is_file()
    done = streamed.nf4(*verify)
    assert done.status == 0, done.err
