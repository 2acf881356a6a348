"""A build whose files go to the Hub while it is made: early, once, and seen by nobody too soon."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from nf4_pipeline import hub as hub_package
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.errors import HubError
from nf4_pipeline.hub import LocalFile, Target
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.records import PUSH
from nf4_pipeline.stages.upload_ahead import UploadAhead

from tests.support import hub_uploads
from tests.support.hub_server import TOKEN, Fault, HubServer
from tests.support.hub_worker import Worker
from tests.support.tiny import Done, content_of, copy_of

assert hub_uploads  # its routes are registered by importing it

pytestmark = pytest.mark.usefixtures("workers_here")


@dataclass
class Output:
    """A finished build of a local model, a Hub, and a process that may push there."""

    hub: HubServer
    worker: Worker
    build: Build
    model: Path
    recipe: Path

    def nf4(self, *args: str | Path) -> Done:
        root = self.build.root
        options = (self.model, "--build-dir", root, "--recipe", self.recipe, *args)
        return self.worker.nf4(root.parent, "build", *options)

    def puts(self) -> list[str]:
        """The objects that were sent, in their order."""
        return [one.path.rpartition("/")[2] for one in self.hub.seen if one.method == "PUT"]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, Worker]]:
    with HubServer() as server:
        home = tmp_path_factory.mktemp("ahead") / "hf"
        server.store.users[TOKEN] = "me"
        with Worker(home, server.url, HF_TOKEN=TOKEN, HF_HUB_DOWNLOAD_TIMEOUT="1") as worker:
            yield server, worker


@pytest.fixture
def output(
    process: tuple[HubServer, Worker],
    verified: Path,
    tiny_falcon: Path,
    quick_recipe: Path,
    tmp_path: Path,
) -> Iterator[Output]:
    hub, worker = process
    hub.seen.clear()
    build = Build(copy_of(verified, tmp_path / "build"))
    yield Output(hub, worker, build, tiny_falcon, quick_recipe)
    hub.faults.clear()


def test_files_go_ahead_and_one_commit_names_them(output: Output) -> None:
    """Before it, an empty private repo is all that anybody sees."""
    seen: list[set[str]] = []
    repos = output.hub.store.repos
    output.hub.before(
        "/api/models/me/ahead/commit/*", lambda: seen.append(set(repos["me/ahead"].head.files))
    )
    done = output.nf4("--stream-output", "me/ahead", "--json")
    assert done.status == 0, done.err
    assert seen == [{".gitattributes"}]
    repo = repos["me/ahead"]
    assert repo.private
    head = repo.head
    assert repo.commits[head.parent or ""].parent is None  # one commit after the first
    held = {path: blob.data for path, blob in head.files.items() if path != ".gitattributes"}
    assert held == content_of(output.build.export)
    assert "me/ahead" in (output.build.export / "README.md").read_text()
    weights = {
        entry.sha256
        for name, entry in output.build.need(PUSH).facts.files.items()
        if name.endswith(".safetensors")
    }
    assert len(output.puts()) == len(set(output.puts()))
    assert weights <= set(output.puts())
    assert json.loads(done.out)["pushed"]["commit"] == head.sha
    output.hub.seen.clear()
    done = output.nf4("--stream-output", "me/ahead")
    assert done.status == 0, done.err
    assert repo.head is head
    assert output.puts() == []


def test_what_does_not_go_ahead_goes_at_the_end(output: Output) -> None:
    """An upload that fails while others are made is no failure of the build."""
    output.hub.faults.append(Fault("*/info/lfs/objects/batch", times=1, status=403))
    done = output.nf4("--stream-output", "me/late")
    assert done.status == 0, done.err
    assert "was not sent ahead, and will be sent at the end" in done.err
    held = output.hub.store.repos["me/late"].head.files
    assert {*held} - {".gitattributes"} == {*content_of(output.build.export)}


def test_files_that_will_be_cut_are_not_sent() -> None:
    """Their pieces are, at the end: what nothing names would only lie there."""
    ahead = UploadAhead(Target("me/cut"), 100, SILENT)
    ahead.add(Path("large.safetensors"), FileDigest(101, "0" * 64))
    assert not ahead._taken
    ahead.__exit__(None, None, None)


def test_a_verdict_that_is_no_pass_publishes_nothing(output: Output) -> None:
    path = output.build.root / "records" / "verify.json"
    record = json.loads(path.read_text())
    record["facts"]["verdict"] = "fail"
    path.write_text(json.dumps(record))
    done = output.nf4("--stream-output", "me/failed")
    assert done.status == 1, done.err
    assert {*output.hub.store.repos["me/failed"].head.files} == {".gitattributes"}
    assert output.build.record(PUSH) is None


@pytest.mark.parametrize(
    ("repo", "status", "why"),
    [("no-owner", 2, "owner is missing"), ("others/one", 1, "others/one")],
    ids=["no owner", "somebody else's"],
)
def test_what_is_refused_is_refused_first(repo: str, status: int, why: str, output: Output) -> None:
    """Nothing is read, quantized or sent before it is known that the Hub would take it."""
    fresh = output.build.root.parent / "fresh"
    done = output.nf4("--stream-output", repo, "--build-dir", fresh)
    assert done.status == status
    assert why in done.err
    assert not fresh.exists()
    assert output.puts() == []


class Sending:
    """What sends files, as far as it is let; a file may be refused."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.fault: BaseException | None = None
        self.left: list[str] = []
        self.sent: list[str] = []

    def __call__(
        self, files: Mapping[str, LocalFile], target: Target, reporter: Reporter
    ) -> list[str]:
        assert self.gate.acquire(timeout=60)
        if self.fault is not None:
            raise self.fault
        self.sent += files
        return self.left


@pytest.fixture
def ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[UploadAhead, Sending]]:
    """Two files of 100 bytes have room; the Hub takes them when the test says so."""
    sending = Sending()
    monkeypatch.setattr(hub_package, "send_ahead", sending)
    monkeypatch.setattr(hub_package, "repo_url", lambda repo: f"https://hub/{repo}")
    ahead = UploadAhead(Target("me/out"), 1000, SILENT)
    ahead._build, ahead._room = Build(tmp_path), 200
    yield ahead, sending
    sending.gate.release(99)
    ahead.__exit__(None, None, None)


def finished(folder: Path, name: str) -> tuple[Path, FileDigest]:
    path = folder / name
    path.write_bytes(name.encode() * 100)
    return path, FileDigest.of(path.read_bytes())


def test_a_file_waits_for_room(ahead: tuple[UploadAhead, Sending], tmp_path: Path) -> None:
    """It is noted that the Hub has a file before it goes; then there is room for another."""
    out, sending = ahead
    files = [finished(tmp_path, name) for name in "abc"]
    for path, digest in files[:2]:
        out.reserve(digest.size)
        out.add(path, digest)
    third = threading.Thread(target=out.reserve, args=(100,))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    assert all(path.exists() for path, _ in files)
    sending.gate.release()
    third.join(60)
    assert not third.is_alive()
    assert not files[0][0].exists()
    assert Build(tmp_path).sent.files == {files[0][1].sha256: 100}
    out.add(*files[2])
    sending.gate.release(2)
    out.settle()
    assert sending.sent == ["a", "b", "c"]
    assert not any(path.exists() for path, _ in files)
    again = finished(tmp_path, "a")  # made, and killed before it could go
    out.reserve(100)
    out.add(*again)
    out.settle()
    assert sending.sent == ["a", "b", "c"]
    assert not again[0].exists()


FAULTS = (HubError, OSError, ValueError, KeyError, RuntimeError, MemoryError, SystemExit)


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_what_cannot_be_sent_ends_the_build(
    kind: type[BaseException], ahead: tuple[UploadAhead, Sending], tmp_path: Path
) -> None:
    """Whoever waits for room hears of it, whatever it is; the file stays."""
    out, sending = ahead
    sending.fault = kind("planned")
    path, digest = finished(tmp_path, "a")
    out.reserve(digest.size)
    out.add(path, digest)
    sending.gate.release()
    with pytest.raises(kind, match="planned"):
        out.settle()
    with pytest.raises(kind, match="planned"):
        out.reserve(100)
    assert path.exists()
    assert Build(tmp_path).sent.files == {}
    with pytest.raises(kind, match="planned"):
        out.restart()


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_where_files_stay_it_ends_nothing(
    kind: type[BaseException], ahead: tuple[UploadAhead, Sending], tmp_path: Path
) -> None:
    out, sending = ahead
    out._room, sending.fault = None, kind("planned")
    path, digest = finished(tmp_path, "a")
    out.reserve(digest.size)
    out.add(path, digest)
    sending.gate.release()
    out.drain()
    out.settle()
    assert path.exists()


def test_what_is_kept_in_git_does_not_go(
    ahead: tuple[UploadAhead, Sending], tmp_path: Path
) -> None:
    """Its bytes come with the commit alone: it is neither noted nor deleted."""
    out, sending = ahead
    sending.left = ["a"]
    path, digest = finished(tmp_path, "a")
    out.reserve(digest.size)
    out.add(path, digest)
    sending.gate.release()
    with pytest.raises(HubError, match=r"me/out keeps it in git.*\.gitattributes"):
        out.settle()
    assert path.exists()
    assert Build(tmp_path).sent.files == {}


@pytest.mark.parametrize("why", ["too large", "on its way", "absent"])
def test_what_is_not_sent_takes_no_room(
    why: str, ahead: tuple[UploadAhead, Sending], tmp_path: Path
) -> None:
    """Else `settle` would wait for it for ever."""
    out, sending = ahead
    path, digest = finished(tmp_path, "a")
    out.reserve(digest.size)
    if why == "too large":
        out.largest = digest.size - 1
    elif why == "absent":
        path.unlink()
    else:
        out.add(path, digest)
        out.reserve(digest.size)
    out.add(path, digest)
    sending.gate.release()
    waiting = threading.Thread(target=out.settle, daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()
    assert len(sending.sent) == (why == "on its way")


def test_a_repo_that_keeps_weights_in_git(output: Output) -> None:
    """Where files stay here, all of them come with the commit."""
    repo = output.hub.store.add("me/plain", {".gitattributes": b""})
    repo.readers, repo.writers = {"me"}, {"me"}
    done = output.nf4("--stream-output", "me/plain")
    assert done.status == 0, done.err
    assert {*repo.head.files} - {".gitattributes"} == {*content_of(output.build.export)}
