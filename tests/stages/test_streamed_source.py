"""A build whose source stays on the Hub: the same bytes, little disk, nothing fetched in vain."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.errors import SourceError
from nf4_pipeline.hub import RemoteFile, RemoteModel
from nf4_pipeline.job import run_stage
from nf4_pipeline.model.tokenizer_facts import TokenizerFacts
from nf4_pipeline.progress import SILENT
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import DOWNLOAD, QUANTIZE, SERIALIZE, VERIFY, Reading
from nf4_pipeline.stages.find_source import _streamed
from nf4_pipeline.stages.forecast import Forecast
from nf4_pipeline.stages.hub_files import HubFiles, SeenOnHub
from nf4_pipeline.stages.preflight import Findings
from nf4_pipeline.stages.streamed_source import StreamedSource, open_source
from nf4_pipeline.verification.document import MeasuredVerification

from tests.support import hub_uploads
from tests.support.hub_server import TOKEN, Fault, HubServer, Seen
from tests.support.hub_worker import Worker
from tests.support.jobs import CPU, download
from tests.support.stores import fresh_url
from tests.support.tiny import Done, copy_of, write_falcon

assert hub_uploads  # its routes are registered by importing it

pytestmark = pytest.mark.usefixtures("workers_here")

SHARDS = 8
Process = tuple[HubServer, Worker, Path]


@dataclass
class Streamed:
    """A Hub with a model, and a process that builds from it, each time in a folder of its own."""

    hub: HubServer
    worker: Worker
    model: Path
    folder: Path
    recipe: Path
    home: Path

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

    def bytes_of(self, requests: Sequence[Seen]) -> int:
        """Of weights, in answers to requests."""
        asked = [
            seen.range.removeprefix("bytes=").split("-")
            for seen in requests
            if seen.cdn and seen.method == "GET" and seen.path.endswith(".safetensors")
        ]
        return sum(int(end) - int(start) + 1 for start, end in asked)

    def stretches(self, since: int) -> Counter[tuple[str, str]]:
        """How often each stretch of each shard was sent."""
        return Counter(
            (seen.path.rpartition("/")[2], seen.range)
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
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A Hub, a process that knows it, and the process's HF_HOME."""
    with HubServer() as server:
        home = tmp_path_factory.mktemp("streaming") / "hf"
        server.store.users[TOKEN] = "me"
        with Worker(home, server.url, HF_TOKEN=TOKEN, HF_HUB_DOWNLOAD_TIMEOUT="1") as worker:
            yield server, worker, home


@pytest.fixture
def streamed(
    process: Process, model: Path, tmp_path: Path, quick_recipe: Path
) -> Iterator[Streamed]:
    hub, worker, home = process
    hub.store.add("me/tiny", model)
    yield Streamed(hub, worker, model, tmp_path, quick_recipe, home)
    hub.faults.clear()
    hub.pause = 0.0


def files_of(hub: HubServer, repo: str) -> set[str]:
    """What anybody who may read a repo sees in it."""
    return set(hub.store.repos[repo].head.files)


@dataclass
class Peak:
    """The most bytes that were seen in a folder."""

    total: int = 0
    samples: int = 0


@contextmanager
def watched(build: Build) -> Iterator[Peak]:
    """Samples the disk that a build takes, hard links once, until the body ends."""
    peak, stop = Peak(), threading.Event()

    def sample() -> None:
        sizes: dict[int, int] = {}
        for folder, _, names in os.walk(build.root):
            for path in (Path(folder) / name for name in names):
                try:
                    found = path.lstat()
                except FileNotFoundError:
                    continue
                sizes[found.st_ino] = found.st_blocks * 512
        peak.total = max(peak.total, sum(sizes.values()))
        peak.samples += 1

    def repeat() -> None:
        while not stop.is_set():
            sample()
            time.sleep(0.01)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        sample()


def test_a_whole_build(streamed: Streamed, ordinary: dict[str, FileDigest]) -> None:
    """The same hashes on no more disk than promised; fidelity measured; then nothing is done.

    What is finished goes to another repo meanwhile, where one commit names it at the end.
    """
    hub, build, shards = streamed.hub, streamed.build, streamed.shards
    options: list[str | Path] = ["me/tiny", "--stream-source", "--build-dir", "build"]
    options += ["--recipe", streamed.recipe]
    options += ["--stream-output", "me/out"]
    promise = Forecast.from_json(streamed.nf4("build", *options, "--dry-run", "--json").value)
    sizes = {path.name: path.stat().st_size for path in streamed.model.glob("*.safetensors")}
    assert promise.fetch_bytes > 2 * sum(sizes.values())
    assert promise.lying_bytes == promise.quantized_bytes  # little enough for any disk
    seen: list[set[str]] = []
    hub.before("/api/models/me/out/commit/*", lambda: seen.append(files_of(hub, "me/out")))
    before = len(hub.seen)
    with watched(build) as peak:
        hub.pause = 0.001
        streamed.run("download")
        planned = len(hub.seen)
        done = streamed.nf4("build", *options, "--json")
        hub.pause = 0.0
    assert done.status == 0, done.err
    assert peak.samples > 20
    assert peak.total <= promise.builds.needed
    assert build.need(QUANTIZE).outputs == ordinary
    verification = build.need(VERIFY).facts
    assert isinstance(verification, MeasuredVerification)
    assert verification.verdict == "pass"
    assert verification.fidelity.tokens > 0
    assert verification.answers == ()
    cached = [path for path in streamed.home.rglob("*") if path.is_file()]
    assert not any(path.stat().st_size in sizes.values() for path in cached)
    assert not list(build.root.rglob("model-*.safetensors"))
    assert verification.readers is not None
    assert {check.name for check in verification.checks} > {
        "files that the Hub alone has, made again",
        "files as in the manifest",
    }
    requests = hub.seen[before:]
    asked = Counter((one.path.rpartition("/")[2], one.range) for one in requests if one.cdn)
    assert not any(asked[name, ""] for name in shards)
    assert streamed.bytes_of(hub.seen[planned:]) == promise.fetch_bytes
    blocks = 0
    for tensor in open_source(build).tensors:
        if ".h." in tensor.name:
            first, last = tensor.header.offset, tensor.header.offset + tensor.header.nbytes
            passed = json.loads((build.root / f"streamed/passed/{tensor.file}.json").read_text())
            for stretch in passed["stretches"]:
                if stretch["start"] < last and stretch["end"] > first:
                    wanted = f"bytes={stretch['start']}-{stretch['end'] - 1}"
                    assert asked[tensor.file, wanted] == 3  # quantize, make again, compare
                    blocks += 1
    assert blocks > 12
    sent = [number for number, one in enumerate(requests) if one.method == "PUT"]
    assert len(sent) == len({requests[number].path for number in sent}) >= len(ordinary)
    assert sent[0] < max(n for n, one in enumerate(requests) if one.range), "all of it was verified"
    assert seen == [{".gitattributes"}]
    held = hub.store.repos["me/out"].head.files
    manifest = json.loads((build.export / "manifest.json").read_text())["files"]
    assert {n: held[n].sha256 for n in manifest} == {n: d["sha256"] for n, d in manifest.items()}
    for path in build.export.rglob("*"):
        if path.is_file():
            assert held[path.relative_to(build.export).as_posix()].data == path.read_bytes()
    assert done.value["pushed"]["commit"] == hub.store.repos["me/out"].head.sha
    before = len(hub.seen)
    done = streamed.nf4("build", *options)
    assert done.status == 0, done.err
    assert "nothing had to be done" in done.out
    assert re.search(rf"on the Hub .*{hub.store.repos['me/out'].head.sha}", done.out)
    status = streamed.nf4("status", "--build-dir", "build").out
    assert "GB of weights stay on the Hub" in status
    assert status.count(" done ") == 5
    assert not streamed.fetched(before)
    assert not any(one.method == "PUT" for one in hub.seen[before:])


def test_what_the_hub_alone_has(streamed: Streamed, ordinary: dict[str, FileDigest]) -> None:
    """It refuses files, a note of it is lost, it forgets one: each is said, and mended."""
    hub, build, store = streamed.hub, streamed.build, streamed.hub.store
    nf4 = partial(streamed.worker.nf4, streamed.folder, with_readers=False)
    options: list[str | Path] = ["me/tiny", "--stream-source", "--build-dir", "build"]
    options += ["--recipe", streamed.recipe]
    sends = [*options, "--stream-output", "me/kept"]
    fault = Fault("*/me/kept.git/info/lfs/objects/batch", times=99, status=403)
    hub.faults.append(fault)
    done = nf4("build", *sends)
    assert done.status == 1
    assert "uploading to me/kept" in done.err
    assert build.record(QUANTIZE) is None
    assert list(build.quantized.glob("*.safetensors"))  # what is finished is kept
    hub.faults.clear()
    hub.faults.append(Fault("*/me/kept/commit/main", times=99, status=403, method="POST"))
    before = len(hub.seen)
    done = nf4("build", *sends)
    assert done.status == 1  # all but the commit: nobody sees anything of it
    assert "committing to me/kept" in done.err
    assert build.need(VERIFY).facts.verdict == "pass"
    assert files_of(hub, "me/kept") == {".gitattributes"}
    assert not list(build.root.rglob("model-*.safetensors"))
    hub.faults.clear()
    sent = json.loads((build.root / "sent.json").read_text())
    lost = sorted(sent["files"])[0]
    sent["files"].pop(lost)  # it died before it could note this one
    (build.root / "sent.json").write_text(json.dumps(sent))
    forgotten = sorted(sent["files"])[0]
    hub.before(
        "/api/models/me/kept/commit/*", lambda: store.repos["me/kept"].objects.pop(forgotten)
    )
    done = nf4("build", *sends)
    assert done.status == 0, done.err
    assert "The Hub has lost 1 of the files" in done.err
    puts = Counter(one.path.rpartition("/")[2] for one in hub.seen[before:] if one.method == "PUT")
    assert {sha256: times for sha256, times in puts.items() if times > 1} == {forgotten: 2}
    held = store.repos["me/kept"].head.files
    manifest = json.loads((build.export / "manifest.json").read_text())["files"]
    assert {n: held[n].sha256 for n in manifest} == {n: d["sha256"] for n, d in manifest.items()}
    done = nf4("attest", "--build-dir", "build")
    assert done.status == 0, done.err
    done = nf4("push", "build", "--repo-id", "me/another")
    assert done.status == 1
    assert "are in" in done.err
    assert "/me/kept alone" in done.err
    assert "me/another" not in store.repos
    done = nf4("prompt", "build", "Once")
    assert done.status == 1
    assert f"its weights are in {hub.url}/me/kept alone" in done.err
    done = nf4("build", *options)  # without it, they are wanted here
    assert done.status == 0, done.err
    for name, digest in ordinary.items():
        assert FileDigest.of((build.root / name).read_bytes()) == digest
    assert len(list(build.export.glob("model-*.safetensors"))) == len(ordinary)


def test_a_repo_that_keeps_weights_in_git(streamed: Streamed) -> None:
    """None of their bytes would be there before the commit: nothing is deleted here."""
    repo = streamed.hub.store.add("me/plain", {".gitattributes": b""})
    repo.readers, repo.writers = {"me"}, {"me"}
    options = ["--stream-source", "--stream-output", "me/plain", "--build-dir", "build"]
    done = streamed.nf4("build", "me/tiny", *options)
    assert done.status == 1
    assert "me/plain keeps it in git, not in LFS" in done.err
    assert list(streamed.build.quantized.glob("*.safetensors"))
    assert not streamed.build.sent.files


def test_verify_without_the_hub(streamed: Streamed) -> None:
    """What verify says to a worker when the Hub gives it nothing: words, and no verdict."""
    streamed.run("download", "quantize")
    streamed.hub.faults.append(Fault("*.safetensors", times=99, status=403))
    (streamed.build.root / f"streamed/passed/{streamed.shards[0]}.json").unlink()
    done = streamed.nf4("serialize", "--build-dir", "build")
    assert done.status == 0, done.err  # it needs the headers alone
    done = streamed.nf4("verify", "--build-dir", "build", "--recipe", streamed.recipe)
    assert done.status == 1
    assert f"streaming {streamed.shards[0]}" in done.err
    assert streamed.build.record(VERIFY) is None


def test_what_is_finished_is_not_fetched_again(
    streamed: Streamed, ordinary: dict[str, FileDigest]
) -> None:
    """The Hub refuses one file after the other; each run goes on where the last one ended."""
    streamed.run("download")
    assert not any(path.is_file() for path in streamed.build.source.glob("*.safetensors"))
    shards, finished = streamed.shards, 0
    for number in (2, 3, len(shards) - 1):
        before = len(streamed.hub.seen)
        streamed.hub.faults.append(Fault(f"*/{shards[number]}", times=9, status=403))
        done = streamed.nf4("quantize", "--build-dir", "build")
        streamed.hub.faults.clear()
        assert done.status == 1
        assert shards[number] in done.err
        assert streamed.fetched(before).keys() == set(shards[finished:number])
        finished = number
    assert len(list(streamed.build.quantized.glob("*.facts.json"))) == SHARDS - 1
    before = len(streamed.hub.seen)
    streamed.run("quantize", "serialize")
    assert streamed.fetched(before).keys() == {shards[-1]}
    assert streamed.build.need(QUANTIZE).outputs == ordinary
    assert not (streamed.build.root / "streamed" / "spool").exists()
    manifest = json.loads((streamed.build.export / "manifest.json").read_text())
    assert manifest["source"]["files"].keys() >= set(shards)
    assert streamed.build.record(SERIALIZE) is not None


def test_what_a_killed_run_left_counts_for_nothing(
    streamed: Streamed, ordinary: dict[str, FileDigest]
) -> None:
    """It had made a file whose source had not come to its end: that may hold anything."""
    streamed.run("download")
    streamed.build.quantized.mkdir()
    left = streamed.build.quantized / Path(min(ordinary)).name
    left.write_bytes(b"made of what was never hashed")
    streamed.run("quantize")
    assert streamed.build.need(QUANTIZE).outputs == ordinary


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


@pytest.mark.parametrize("times", [1, 99])
@pytest.mark.parametrize("stretch", ["bytes=[!0]*", "bytes=0-*"], ids=["middle", "header"])
def test_wrong_bytes_never_count(
    times: int, stretch: str, streamed: Streamed, ordinary: dict[str, FileDigest]
) -> None:
    """A file that came wrong is fetched again once, as by `nf4 download`."""
    streamed.run("download")
    name = streamed.shards[1]
    fault = Fault(f"*/{name}", times, wanted=stretch, cdn=True, method="GET", flip_bit=8_000)
    streamed.hub.faults.append(fault)
    done = streamed.nf4("quantize", "--build-dir", "build")
    assert done.status == (0 if times == 1 else 1), done.err
    assert f"{name}: expected sha256" in done.err
    assert "fetching it again" in done.err
    if times > 1:
        assert f"{name} of me/tiny" in done.err
        assert "came wrong twice" in done.err
        made = {path.name for path in streamed.build.quantized.iterdir()}
        assert made == {n for f in made for n in (f, f"{f}.facts.json") if "facts" not in f}
        assert not (streamed.build.root / f"streamed/passed/{name}.json").exists()
        streamed.hub.faults.clear()
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


def make_tied_differ(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    last = max(model.glob("*.safetensors"))
    tensors = load_file(last)
    assert "lm_head.weight" in tensors
    tensors["lm_head.weight"] += 1
    save_file(tensors, last, metadata={"format": "pt"})


def test_tied_weights_that_differ_are_both_kept(
    process: Process, tmp_path: Path, quick_recipe: Path
) -> None:
    """They lie in different files, which are never here together."""
    model = write_falcon(tmp_path / "model", shards=4)
    make_tied_differ(model)
    build, *_ = download(model, tmp_path / "artifacts")
    run_stage(build, "quantize", Recipe(), CPU, SILENT)
    hub, worker, home = process
    hub.store.add("me/tiny", model)
    streamed = Streamed(hub, worker, model, tmp_path, quick_recipe, home)
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


def test_a_hub_that_lists_no_hash(tmp_path: Path) -> None:
    """A small file that is in git itself has none that this program could name it by."""
    part = RemoteFile("model.safetensors", 10, None, "0" * 40)
    model = RemoteModel("me/tiny", "1" * 40, (part,))
    files = HubFiles(model, Reading(), False, False, SILENT)
    files.folder = tmp_path
    facts = TokenizerFacts(status="none")
    findings = Findings(cast(Any, None), facts, ())
    seen = SeenOnHub((part,), {part.path: b""}, findings, frozenset(), None)
    with pytest.raises(SourceError, match=r"lists no sha256 of model\.safetensors.*Leave --stream"):
        _streamed(files, seen)


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


def test_what_a_dry_run_says(streamed: Streamed) -> None:
    """Of the source nothing lies on the disk."""
    options = ("me/tiny", "--stream-source", "--build-dir", "build", "--dry-run")
    done = streamed.nf4("build", *options, "--json")
    found = Forecast.from_json(done.value)
    assert found.quantized_bytes < found.builds.needed < found.quantized_bytes + 2**26
    assert 0 < found.window_bytes < found.memory_bytes
    assert found.hub_cache is not None
    assert found.hub_cache.needed == 0
    shown = streamed.nf4("build", *options).out
    assert "streamed: fetched once to be quantized, and once more to verify" in shown
    shown = streamed.nf4("build", *options, "--stream-output", "me/never").out
    assert "once more, to be made again, to verify" in shown
    assert "of memory (/dev/shm) to verify the result" in shown
    assert "me/never" not in streamed.hub.store.repos


@pytest.mark.parametrize("differs", [False, True], ids=["tied", "tied tensors that differ"])
def test_tasks_of_a_cluster_fetch_each_file_once(
    streamed: Streamed, tmp_path: Path, *, differs: bool
) -> None:
    """What later work must know of them stands in the folder; nothing else is left there."""
    model = streamed.model
    if differs:
        model = copy_of(model, tmp_path / "model")
        make_tied_differ(model)
        streamed.hub.store.add("me/tiny", model)
    streamed.run("download")
    since = len(streamed.hub.seen)
    done = streamed.worker.nf4(
        streamed.folder,
        *("quantize", "--build-dir", "build", "--engine", "ray", "-q"),
        cluster="everything",
    )
    assert done.status == 0, done.err
    here, *_ = download(model, tmp_path / "here")
    run_stage(here, "quantize", Recipe(), CPU, SILENT)
    quantized = streamed.build.need(QUANTIZE)
    assert quantized.outputs == here.need(QUANTIZE).outputs
    assert quantized.facts.untied == (("lm_head.weight",) if differs else ())
    fetched = streamed.stretches(since)
    assert {name for name, _ in fetched} == {*streamed.shards}
    assert max(fetched.values()) == (2 if differs else 1)
    rest = StreamedSource.of(streamed.build, SILENT)
    assert rest is not None
    assert rest.missing(None) == []
    assert not list(streamed.build.root.glob("streamed/spool*"))
    assert not list(streamed.build.root.glob(".lock.*"))


def test_tasks_that_see_nothing_fetch_what_they_need(
    streamed: Streamed, ordinary: dict[str, FileDigest]
) -> None:
    """The driver has the whole source, and a URL; each task fetches a file and leaves one there."""
    url = fresh_url("file", streamed.folder)
    done = streamed.nf4("download", "me/tiny", "--build-dir", url, "-q")
    assert done.status == 0, done.err
    since = len(streamed.hub.seen)
    done = streamed.worker.nf4(
        streamed.folder,
        *("quantize", "--build-dir", url, "--engine", "ray", "--json", "-q"),
        cluster="without_files",
    )
    assert done.status == 0, done.err
    hashes = {name: one["sha256"] for name, one in done.value["outputs"].items()}
    assert hashes == {name: digest.sha256 for name, digest in ordinary.items()}
    fetched = streamed.stretches(since)
    assert {*fetched.values()} == {1}
    assert len({name for name, _ in fetched}) == len(ordinary)
