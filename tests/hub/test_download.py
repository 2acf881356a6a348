"""Looking a model up and fetching it, over real HTTP, from a Hub that misbehaves on purpose."""

from __future__ import annotations

import errno
import hashlib
import random
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock
from nf4_pipeline.errors import HubError, ResourceError
from nf4_pipeline.hub import RemoteFile, RemoteModel, client, file_digests, wanted_files
from nf4_pipeline.hub.errors import Request

from tests.support.hub_client import Run, run
from tests.support.hub_server import Fault, HubServer
from tests.support.hub_store import Repo, git_sha1

REPO = "some-org/tiny"
WEIGHTS = "model-00001-of-00002.safetensors"
LOOKUP = "/api/models/*/revision/*"
TOKEN = "hf_abcdefghijklmnopqrst"


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


WANTED = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "model-00001-of-00002.safetensors": noise(1, 5_000_000),  # more than one chunk to hash
    "model-00002-of-00002.safetensors": noise(2, 200_000),
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.json": noise(3, 1_100_000),  # LFS by size
    "tokenizer.model": noise(4, 5_000),
    "chat_template.jinja": "{{ messages }} é".encode(),
    "additional_chat_templates/tool use.jinja": b"{{ tools }}",
    "LICENSE.txt": b"Apache-2.0",
    "README.md": b"---\nlicense: apache-2.0\n---\n",
}
UNWANTED = {
    ".gitattributes": b"*.safetensors filter=lfs",
    "modeling_tiny.py": b"raise SystemExit('never run')",
    "handler.py": b"",
    "pytorch_model.bin": noise(5, 1_000),
    "model.fp16.safetensors": noise(6, 1_000),
    "consolidated.safetensors": noise(7, 1_000),
    "model.gguf": noise(8, 1_000),
    "onnx/model.onnx": noise(9, 1_000),
    "onnx/config.json": b"{}",
    "LICENSES/MIT.txt": b"",
    "additional_chat_templates/helper.py": b"",
    "preview.png": b"",
}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def repo(hub: HubServer) -> Repo:
    return hub.store.add(REPO, WANTED | UNWANTED)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty HF_HOME."""
    return tmp_path / "hf"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("filled")
    with HubServer() as server:
        server.store.add(REPO, WANTED | UNWANTED)
        assert_complete(run(home, server.url, REPO))
    return home


@pytest.fixture
def warm(filled: Path, home: Path) -> Path:
    """An HF_HOME that holds the first commit of `repo`."""
    shutil.copytree(filled, home, symlinks=True)
    return home


def cached(home: Path, *parts: str) -> Path:
    return home.joinpath("hub", "models--some-org--tiny", *parts)


def blob_requests(hub: HubServer) -> int:
    return hub.count("GET", "*/resolve/*") + hub.count("GET", "*", cdn=True)


def assert_complete(found: Run, files: dict[str, bytes] = WANTED) -> None:
    assert found.error == "", found.message
    assert found.sha256 == {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    assert {path: (found.folder / path).read_bytes() for path in files} == files


# What comes, and where it goes.


def test_pins_the_branch_and_fetches_what_the_pipeline_reads(
    hub: HubServer, repo: Repo, home: Path
) -> None:
    first = repo.refs["main"]
    repo.refs["v1"] = first
    repo.commit({"config.json": b'{"newer": true}'})

    found = run(home, hub.url, REPO, revision="v1")

    assert_complete(found)
    assert found.commit == first
    assert found.folder == cached(home, "snapshots", first)
    there = {p.relative_to(found.folder).as_posix() for p in found.folder.rglob("*") if p.is_file()}
    assert there == set(WANTED)
    assert found.listed[WEIGHTS] == [
        5_000_000,
        hashlib.sha256(WANTED[WEIGHTS]).hexdigest(),
        None,
    ]
    assert found.listed["config.json"] == [23, None, git_sha1(WANTED["config.json"])]
    total = sum(map(len, WANTED.values()))
    assert found.tasks == {"download": [total, total], "check": [total, total]}
    assert found.notes == []
    assert cached(home, "refs", "v1").read_text() == first


def test_without_a_revision_it_is_main_and_other_folders_of_the_cache_stay_empty(
    hub: HubServer, repo: Repo, home: Path
) -> None:
    found = run(home, hub.url, REPO)
    assert_complete(found)
    assert found.commit == repo.refs["main"]
    assert [path.name for path in (home / "hub").glob("models--*")] == ["models--some-org--tiny"]


def test_follows_the_pages_of_a_long_listing(hub: HubServer, repo: Repo, home: Path) -> None:
    hub.page_size = 5
    found = run(home, hub.url, REPO, fetch=False)
    assert set(found.listed) == set(WANTED | UNWANTED)
    assert hub.count("GET", "*/tree/*") == 6  # 23 files and 3 folders


def test_a_second_run_asks_for_no_file_and_still_checks_each(
    hub: HubServer, repo: Repo, warm: Path
) -> None:
    found = run(warm, hub.url, REPO)
    assert_complete(found)
    assert hub.count("HEAD", "*") + blob_requests(hub) == 0
    assert found.tasks["check"][1] == sum(map(len, WANTED.values()))


def test_a_new_commit_fetches_only_what_changed(hub: HubServer, repo: Repo, warm: Path) -> None:
    changed = {"config.json": b'{"model_type": "falcon"}'}
    repo.commit(changed)
    found = run(warm, hub.url, REPO)
    assert_complete(found, WANTED | changed)
    assert blob_requests(hub) == 1


def test_the_token_goes_to_the_hub_and_never_to_its_cdn(
    hub: HubServer, repo: Repo, home: Path
) -> None:
    hub.store.users[TOKEN] = "me"
    assert_complete(run(home, hub.url, REPO, env={"HF_TOKEN": TOKEN}))
    assert all(seen.authorized for seen in hub.seen if not seen.cdn)
    assert [seen.authorized for seen in hub.seen if seen.cdn] == [False] * 3


# Which files are wanted.


def remote(*paths: str) -> RemoteModel:
    return RemoteModel(REPO, "a" * 40, tuple(RemoteFile(path, 1, None, None) for path in paths))


def test_wanted_files_are_data_that_the_pipeline_reads() -> None:
    model = remote(*WANTED, *UNWANTED)
    assert {file.path for file in wanted_files(model)} == set(WANTED)


@pytest.mark.parametrize("weights", ["model.safetensors", "model-00001-of-00163.safetensors"])
def test_wanted_weights_may_be_one_file_or_shards(weights: str) -> None:
    assert [file.path for file in wanted_files(remote("config.json", weights))] == [
        "config.json",
        weights,
    ]


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        (["pytorch_model.bin", "config.json"], "its weights: pytorch_model.bin"),
        (["a.bin", "b.bin", "c.pt", "d.pt"], "its weights: a.bin, b.bin, c.pt, …"),
        (["config.json"], "its weights: none at all"),
        (["adapter_model.safetensors"], "no model"),
        (["sub/model.safetensors"], "no model"),
    ],
)
def test_a_repo_without_safetensors_is_refused(paths: list[str], named: str) -> None:
    with pytest.raises(HubError, match=named):
        wanted_files(remote(*paths))


def test_a_pickle_only_repo_is_refused_before_any_file(hub: HubServer, home: Path) -> None:
    hub.store.add(REPO, {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04."})
    found = run(home, hub.url, REPO)
    assert found.error == "HubError"
    assert "only safetensors are read" in found.message.lower()
    assert hub.count("HEAD", "*") + blob_requests(hub) == 0


def test_file_digests_are_those_of_sha256sum_and_git(tmp_path: Path) -> None:
    path = tmp_path / "hello"
    path.write_bytes(b"hello\n")
    sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    assert file_digests(path) == (sha256, None)
    assert file_digests(path, git=True) == (sha256, "ce013625030ba8dba906f756967f9e9ca394464a")


# Bytes that are not right.


@pytest.mark.parametrize("path", [WEIGHTS, "config.json"])
def test_a_flipped_bit_is_noticed_and_the_file_fetched_again(
    hub: HubServer, repo: Repo, home: Path, path: str
) -> None:
    hub.faults.append(Fault(f"*/{path}", method="GET", flip_bit=99))
    if path == WEIGHTS:
        hub.faults[0].cdn = True
    found = run(home, hub.url, REPO)
    assert_complete(found)
    assert len(found.notes) == 1
    assert found.notes[0].startswith(f"{path}: expected ")
    assert found.notes[0].endswith("; fetching it again")
    assert blob_requests(hub) == len(WANTED) + 1


@pytest.mark.parametrize(("path", "kind"), [(WEIGHTS, "sha256"), ("config.json", "git sha1")])
def test_wrong_bytes_twice_fail_by_name_and_leave_the_cache(
    hub: HubServer, repo: Repo, home: Path, path: str, kind: str
) -> None:
    hub.faults.append(Fault(f"*/{path}", method="GET", flip_bit=99, times=9))
    found = run(home, hub.url, REPO)
    data = bytearray(WANTED[path])
    data[12] ^= 8
    right, wrong = (
        hashlib.sha256(d).hexdigest() if kind == "sha256" else git_sha1(d)
        for d in (WANTED[path], bytes(data))
    )
    assert found.error == "HubError"
    assert f"{path} of {REPO}@{found.commit[:12]} came wrong twice" in found.message
    assert f"expected {kind} {right}, got {wrong}" in found.message
    assert hub.faults[0].times == 9 - 2
    assert not cached(home, "snapshots", found.commit, path).is_symlink()
    assert not cached(home, "blobs", right).exists()
    assert not cached(home, "refs", "main").exists()


@pytest.mark.parametrize("damage", [noise(0, 5_000_000), b"short"])
def test_a_file_damaged_in_the_cache_is_fetched_again(
    hub: HubServer, repo: Repo, warm: Path, damage: bytes
) -> None:
    cached(warm, "snapshots", repo.refs["main"], WEIGHTS).resolve().write_bytes(damage)
    found = run(warm, hub.url, REPO)
    assert_complete(found)
    assert blob_requests(hub) == 1
    assert WEIGHTS in found.notes[0]


# A Hub that stumbles.


def test_a_look_up_is_tried_again(hub: HubServer, repo: Repo, home: Path) -> None:
    hub.faults += [
        Fault(LOOKUP, status=429),
        Fault(LOOKUP, cut_after=10),
        Fault(LOOKUP, status=503),
        Fault(LOOKUP, reset_after=10),
    ]
    found = run(home, hub.url, REPO, fetch=False)
    assert found.commit == repo.refs["main"]
    assert found.sleeps == [0.5, 1.0, 2.0, 4.0]
    assert [fault.times for fault in hub.faults] == [0, 0, 0, 0]


def test_a_look_up_waits_as_long_as_the_hub_asks_within_reason(
    hub: HubServer, repo: Repo, home: Path
) -> None:
    hub.faults.append(Fault(LOOKUP, status=429, headers={"Retry-After": "7"}))
    hub.faults.append(Fault(LOOKUP, status=429, headers={"Retry-After": "3600"}))
    found = run(home, hub.url, REPO, fetch=False)
    assert found.commit == repo.refs["main"]
    assert found.sleeps == [7.0, 30.0]


def test_a_listing_is_tried_again(hub: HubServer, repo: Repo, home: Path) -> None:
    hub.faults.append(Fault("*/tree/*", status=503))
    found = run(home, hub.url, REPO, fetch=False)
    assert set(found.listed) == set(WANTED | UNWANTED)


@pytest.mark.parametrize(
    ("status", "tries"), [(429, 5), (503, 5), (403, 1)], ids=["429", "503", "403"]
)
def test_a_failing_look_up_never_serves_the_old_commit(
    hub: HubServer, repo: Repo, warm: Path, status: int, tries: int
) -> None:
    old = repo.refs["main"]
    repo.commit({"config.json": b'{"newer": true}'})
    hub.faults.append(Fault(LOOKUP, times=99, status=status, message="busy today"))
    found = run(warm, hub.url, REPO)
    assert found.error == "HubError"
    assert found.folder == Path()
    assert f"looking up {REPO}@main: {hub.url} answered {status} (busy today)" in found.message
    assert f"HF_HUB_OFFLINE=1 uses the cached commit {old}" in found.message
    assert hub.count("GET", LOOKUP) == len(hub.seen) == tries


def test_an_unreachable_hub_with_nothing_cached(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found = run(home, f"http://127.0.0.1:{port}", REPO)
    assert found.error == "HubError"
    assert f"http://127.0.0.1:{port} cannot be reached (connection refused" in found.message
    assert "HF_HUB_OFFLINE" not in found.message  # it would not help
    assert len(found.sleeps) == 4


def test_blobs_are_tried_again(hub: HubServer, repo: Repo, home: Path) -> None:
    hub.faults += [
        Fault(f"*/{WEIGHTS}", cdn=True, reset_after=100_000),
        Fault(f"*/{WEIGHTS}", cdn=True, status=500),
        Fault(f"*/{WEIGHTS}", cdn=True, status=503),
        Fault("*/config.json", method="HEAD", reset_after=0),
        Fault("*/config.json", method="GET", status=503),
    ]
    found = run(home, hub.url, REPO)
    assert_complete(found)
    assert sorted(found.sleeps) == [0.5, 0.5, 1.0, 1.0, 2.0]  # weights three times, config twice
    assert [fault.times for fault in hub.faults] == [0, 0, 0, 0, 0]
    total = sum(map(len, WANTED.values()))
    assert found.tasks["download"] == [total, total]  # what came twice counts once


def test_a_blob_that_never_comes_fails_by_name_and_leaves_the_ref(
    hub: HubServer, repo: Repo, warm: Path
) -> None:
    old = repo.refs["main"]
    new = repo.commit({WEIGHTS: noise(10, 1_000)})
    hub.faults.append(Fault(f"*/{WEIGHTS}", cdn=True, times=99, status=503))
    found = run(warm, hub.url, REPO)
    assert (found.error, found.commit) == ("HubError", new)
    assert f"downloading {WEIGHTS}: {hub.url} answered 503" in found.message
    assert found.sleeps == [0.5, 1.0, 2.0, 4.0]
    assert cached(warm, "refs", "main").read_text() == old


@pytest.fixture
def about(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Request:
    """What a call is about, with neither the user's cache nor the user's token at hand."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    return Request(REPO, "main", "downloading x")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset"),
        OSError("Consistency check failed: file should be of size 3 but has size 2"),
        RuntimeError("what hf_xet raises"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_faults_that_a_server_cannot_show_are_tried_again(about: Request, error: Exception) -> None:
    outcomes: list[Exception | str] = [error, error, "done"]

    def call() -> str:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    sleeps: list[float] = []
    assert client.attempt(call, about, sleeps.append) == "done"
    assert sleeps == [0.5, 1.0]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(errno.ENOSPC, "No space left"), ResourceError, "x: the disk is full. Make room"),
        (PermissionError(13, "denied", "/c"), HubError, r"client failed \(PermissionError: .*/c"),
        (
            ValueError("GET https://me:pw@cdn/x?Signature=abc failed"),
            HubError,
            r"\(ValueError: GET https://cdn/x failed\)",
        ),
    ],
    ids=["disk-full", "permission", "secrets"],
)
def test_faults_that_stay_fail_at_once_and_in_words(
    about: Request, error: Exception, kind: type[Exception], text: str
) -> None:
    def call() -> None:
        raise error

    sleeps: list[float] = []
    with pytest.raises(kind, match=text):
        client.attempt(call, about, sleeps.append)
    assert sleeps == []


# Half files, and others at work in the same cache.


def test_half_files_of_the_dead_go_and_those_of_the_living_stay(
    hub: HubServer, repo: Repo, home: Path
) -> None:
    etag = hashlib.sha256(WANTED[WEIGHTS]).hexdigest()
    dead = cached(home, "blobs", f"{etag}.0a1b2c3d.incomplete")
    living = cached(home, "blobs", f"{'e' * 64}.0a1b2c3d.incomplete")
    dead.parent.mkdir(parents=True)
    dead.write_bytes(b"half")
    living.write_bytes(b"half")
    lock = home / "hub" / ".locks" / "models--some-org--tiny" / f"{'e' * 64}.lock"
    with FileLock(lock):
        assert_complete(run(home, hub.url, REPO))
        assert not dead.exists()
        assert living.exists()
    assert_complete(run(home, hub.url, REPO))
    assert not living.exists()


def test_two_processes_share_one_cache(hub: HubServer, repo: Repo, home: Path) -> None:
    """Both are in the middle of it at the same time, and each file comes once."""
    hub.pause = 0.02
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda _: run(home, hub.url, REPO), range(2)))
    for found in both:
        assert_complete(found)
    assert blob_requests(hub) == len(WANTED)
    assert not list(home.rglob("*.incomplete"))


def test_a_listing_that_never_comes_ends(hub: HubServer, repo: Repo, home: Path) -> None:
    """The client itself would wait for ever."""
    hub.faults.append(Fault("*/tree/*", delay=8.0))
    found = run(home, hub.url, REPO, fetch=False, env={"HF_HUB_DOWNLOAD_TIMEOUT": "1"})
    assert set(found.listed) == set(WANTED | UNWANTED)
    assert hub.count("GET", "*/tree/*") == 2


# Offline.


@pytest.mark.parametrize("how", ["variable", "argument"])
def test_offline_takes_the_cached_commit_says_so_and_asks_nobody(
    hub: HubServer, repo: Repo, warm: Path, how: str
) -> None:
    old = repo.refs["main"]
    repo.commit({"config.json": b'{"newer": true}'})
    if how == "variable":
        found = run(warm, hub.url, REPO, env={"HF_HUB_OFFLINE": "1"})
    else:
        found = run(warm, hub.url, REPO, offline=True)
    assert_complete(found)
    assert (found.commit, found.offline) == (old, True)
    assert len(found.notes) == 1
    assert found.notes[0].startswith(f"offline: {REPO} at commit {old}, as cached in ")
    assert found.listed[WEIGHTS][1] == hashlib.sha256(WANTED[WEIGHTS]).hexdigest()
    assert hub.seen == []


def test_offline_with_nothing_cached(hub: HubServer, repo: Repo, home: Path) -> None:
    found = run(home, hub.url, REPO, env={"HF_HUB_OFFLINE": "1"})
    assert found.error == "HubError"
    assert f"holds no {REPO}@main: run once with a network" in found.message
    assert hub.seen == []


def test_offline_damage_is_noticed(hub: HubServer, repo: Repo, warm: Path) -> None:
    path = cached(warm, "snapshots", repo.refs["main"], WEIGHTS)
    path.resolve().write_bytes(noise(0, 5_000_000))
    found = run(warm, hub.url, REPO, offline=True)
    assert found.error == "HubError"
    assert f"{WEIGHTS}: expected sha256 " in found.message
    assert "The cached file is damaged" in found.message
    assert hub.seen == []
    assert path.exists()


# Names, rights, room.


def test_a_missing_repo(hub: HubServer, repo: Repo, home: Path) -> None:
    found = run(home, hub.url, "some-org/other")
    assert found.error == "NotFoundError"
    assert found.message == (
        f"some-org/other was not found at {hub.url}, or it is private and no token is set: "
        "check the name, or set HF_TOKEN."
    )
    assert found.sleeps == []


def test_a_missing_revision(hub: HubServer, repo: Repo, home: Path) -> None:
    found = run(home, hub.url, REPO, revision="refs/pr/7")
    assert found.error == "NotFoundError"
    assert (
        f"{REPO} has no revision 'refs/pr/7'. Leave --revision out for main, or take a branch"
        in found.message
    )


def test_a_name_that_cannot_be_one(home: Path) -> None:
    found = run(home, "http://127.0.0.1:9", "a/b/c")
    assert (found.error, found.sleeps) == ("UsageError", [])
    assert "'a/b/c' is no Hub model id" in found.message


@pytest.mark.parametrize(
    ("token", "access"),
    [("", "no token is set"), (TOKEN, "the token that is set has no access to it")],
    ids=["anonymous", "stranger"],
)
def test_a_gated_repo_says_where_to_accept_its_licence(
    hub: HubServer, home: Path, token: str, access: str
) -> None:
    hub.store.add(REPO, WANTED, gated=True)
    hub.store.users[TOKEN] = "stranger"
    found = run(home, hub.url, REPO, env={"HF_TOKEN": token} if token else {})
    assert found.error == "HubError"
    assert found.message == (
        f"{REPO} is gated, and {access}: accept the licence at {hub.url}/{REPO} "
        "and set HF_TOKEN to a token of that account."
    )
    assert blob_requests(hub) == hub.count("GET", "*/resolve/*") == 0
    assert found.sleeps == []


@pytest.mark.parametrize("kind", ["gated", "private"])
def test_a_token_with_access_opens_the_repo(hub: HubServer, home: Path, kind: str) -> None:
    gated = kind == "gated"
    hub.store.add(REPO, WANTED, gated=gated, private=not gated, readers=frozenset({"me"}))
    hub.store.users[TOKEN] = "me"
    assert_complete(run(home, hub.url, REPO, env={"HF_TOKEN": TOKEN}))


def test_a_token_that_is_refused_is_not_repeated(hub: HubServer, repo: Repo, home: Path) -> None:
    found = run(home, hub.url, REPO, env={"HF_TOKEN": TOKEN})
    assert found.error == "HubError"
    assert "does not accept the token that is set: it may be out of date" in found.message
    assert TOKEN not in found.text


@pytest.mark.parametrize("token", [TOKEN, "not-of-the-usual-form"])
def test_a_token_that_the_hub_repeats_is_taken_out(
    hub: HubServer, repo: Repo, home: Path, token: str
) -> None:
    # The cut at 200 characters falls into the token: no piece of it may be left.
    message = f"{'x' * 190} {token} may not"
    hub.faults.append(Fault(LOOKUP, status=403, message=message))
    found = run(home, hub.url, REPO, env={"HF_TOKEN": token})
    assert "answered 403 (xxx" in found.message
    assert "***" in found.message
    assert token[:6] not in found.text


@pytest.mark.parametrize("token", ["hf_with\x0bcontrol", "hf_not_äscii"])
def test_a_token_that_no_header_can_hold_is_not_repeated(
    hub: HubServer, repo: Repo, home: Path, token: str
) -> None:
    found = run(home, hub.url, REPO, env={"HF_TOKEN": token})
    assert found.error == "HubError"
    assert "HF_TOKEN has characters that no token has" in found.message
    assert "control" not in found.text
    assert "scii" not in found.text


def test_a_full_disk_is_refused_before_the_first_byte(
    hub: HubServer, repo: Repo, home: Path
) -> None:
    total = sum(map(len, WANTED.values()))
    found = run(home, hub.url, REPO, free=total - 1)
    assert found.error == "ResourceError"
    assert f"needs {total:,} bytes, and {total - 1:,} are free" in found.message
    assert "HF_HOME" in found.message
    assert blob_requests(hub) == hub.count("HEAD", "*") == 0


def test_a_full_disk_is_enough_for_what_is_there(hub: HubServer, repo: Repo, warm: Path) -> None:
    assert_complete(run(warm, hub.url, REPO, free=0))
