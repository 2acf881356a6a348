"""Objects below a URL: complete or absent, in memory, in a folder, and in S3 over HTTP."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from nf4_pipeline.api.options import make_request
from nf4_pipeline.checkpoint.atomic import write_at
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.errors import StoreError, UsageError
from nf4_pipeline.object_store import ObjectStore, Uploads
from nf4_pipeline.object_store import store as store_module
from nf4_pipeline.object_store.address import check_url
from nf4_pipeline.progress import SILENT

from tests.support.command_line import run_nf4
from tests.support.s3_server import S3Server
from tests.support.stores import KINDS, forget_clients, fresh_url, served
from tests.support.told import Told

NAME = "quantized/model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with served(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("server")
    return fresh_url(request.param, tmp_path)


@pytest.fixture
def store(base: str) -> ObjectStore:
    return ObjectStore(f"{base}/", patience=1.0)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, FileDigest]:
    content = bytes(range(256)) * 4
    path = tmp_path / "made"
    path.write_bytes(content)
    return path, FileDigest.of(content)


def test_a_file_that_was_put_there_comes_back(
    store: ObjectStore, made: tuple[Path, FileDigest], tmp_path: Path
) -> None:
    path, digest = made
    assert store.names() == {}
    assert not store.holds(NAME, digest)
    assert not store.get(NAME, tmp_path / "back", digest)
    store.put(NAME, path, digest)
    assert store.names() == {NAME: 1024}
    assert store.holds(NAME, digest)
    assert store.get(NAME, tmp_path / "back", digest)
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
    assert not store.copy("absent", "export/model.safetensors")
    assert store.copy(NAME, "export/model.safetensors")
    assert store.holds("export/model.safetensors", digest)
    store.delete(NAME)
    store.delete(NAME)
    assert store.names() == {"export/model.safetensors": 1024}


def test_small_objects(store: ObjectStore) -> None:
    store.check_writable()
    assert store.read("build.json", 100) is None
    assert store.write("build.json", b"one", new=True)
    assert store.write("build.json", b"one", new=True)  # as after an answer that was lost
    assert not store.write("build.json", b"two", new=True)
    assert store.read("build.json", 100) == b"one"
    assert store.write("build.json", b"three")
    assert store.read("build.json", 100) == b"three"
    assert store.read("build.json", 4) is None
    assert store.names() == {"build.json": 5}


@pytest.mark.parametrize("lost", [1, 4, 10])
def test_a_fetch_that_is_tried_again_counts_each_byte_once(
    lost: int, made: tuple[Path, FileDigest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is lost after some pieces, twice."""
    path, digest = made
    store = ObjectStore(fresh_url("memory", tmp_path), patience=60.0)
    store.put(NAME, path, digest)
    pieces = [0, 0]

    def losing(descriptor: int, view: memoryview, offset: int) -> None:
        pieces[offset > 0] += 1
        if pieces[0] < 3 and offset >= 100 * lost:
            raise ConnectionResetError("planned")
        write_at(descriptor, view, offset)

    monkeypatch.setattr(store_module, "_PIECE", 100)
    monkeypatch.setattr(store_module, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(store_module, "write_at", losing)
    told = Told()
    with told.task("fetch", digest.size) as task:
        assert store.get(NAME, tmp_path / "back", digest, task)
    assert pieces[0] == 3
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("other", [b"short", b"\xff" * 1024, b"x" * 4096], ids=len)
def test_other_bytes_are_taken_for_nothing_and_are_made_anew(
    other: bytes, store: ObjectStore, made: tuple[Path, FileDigest], tmp_path: Path
) -> None:
    """Whoever wrote them: the object goes, since the next run would meet it again."""
    path, digest = made
    store.put(NAME, path, digest)
    store.write(NAME, other)
    if len(other) != digest.size or store.url.startswith("s3"):
        assert not store.holds(NAME, digest)
    with pytest.raises(StoreError, match=r"It was deleted: run `nf4 build` again"):
        store.get(NAME, tmp_path / "back", digest)
    assert not (tmp_path / "back").exists()
    assert store.names() == {}


def test_whoever_looks_sees_no_half_of_a_file(store: ObjectStore, tmp_path: Path) -> None:
    """While a large file is written again and again, it is there whole, or as it was."""
    large = tmp_path / "large"
    large.write_bytes(b"\x07" * (4 << 20))
    digest = FileDigest.of(large.read_bytes())
    seen: set[int | None] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            seen.add(store.names().get(NAME))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(3):
            store.put(NAME, large, digest)
    finally:
        ended.set()
        looking.join()
    assert seen <= {None, 4 << 20}


def test_uploads_end_with_the_first_failure(
    store: ObjectStore, made: tuple[Path, FileDigest]
) -> None:
    path, digest = made
    begun: list[str] = []

    def put(name: str) -> None:
        begun.append(name)
        if name == "2":
            raise StoreError("refused")
        store.put(name, path, digest)

    def put_all(names: str) -> None:
        with Uploads(store, SILENT) as uploads:
            for name in names:
                if not name.isdigit():
                    raise ValueError("of the work")
                uploads.begin(partial(put, name), digest.size)

    with pytest.raises(StoreError, match="refused"):
        put_all("123")
    with pytest.raises(ValueError, match="of the work"):
        put_all("1x3")
    with Uploads(store, SILENT) as uploads:
        uploads.begin(lambda: put("4"), digest.size)
    assert store.holds("4", digest)
    assert begun[0] == "1"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://", "names no folder"),
        ("s3:///", "names no folder"),
        ("s3://bucket/a ", "a blank at its end"),
        ("s3://bucket/a\nb", "a control in it"),
        ("s3://bucket/a\0b", "a control in it"),
        ("s3://bucket/../other", "cannot be called"),
        ("s3://bucket/*", "for patterns"),
        ("file://tmp/a", "Write: file:///tmp/a"),
        ("s3://bucket/a?versionId=1", "for patterns"),
        ("simplecache::s3://bucket/a", "URLs in each other"),
        ("hf://me/model", "`nf4 push`"),
        ("https://example.org/a", "read only"),
        ("http://example.org/a", "read only"),
        ("sftp://me:secret@host/a", "holds a password"),
        ("sftp://me:x@[/a", "for patterns"),
    ],
)
def test_urls_where_no_build_can_be(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        check_url(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("path", ["s3:/bucket/a", "gs:/bucket/a", "file:/tmp/a", "S3:/b/a"])
def test_a_slash_that_is_missing(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = path.replace(":/", ":///" if path.startswith("file") else "://")
    with pytest.raises(UsageError, match=f"a slash is missing. Write: {said}"):
        make_request("sample", build_dir=path)
    ended = run_nf4("build", "sample", "--build-dir", path)
    assert (ended.status, said in ended.err) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["with a blank", "ü+x#%20&"])
def test_odd_names_of_folders(base: str, name: str, made: tuple[Path, FileDigest]) -> None:
    path, digest = made
    store = ObjectStore(f"{base}/{name}", patience=1.0)
    store.put(NAME, path, digest)
    assert store.write("build.json", b"x", new=True)
    assert store.names() == {NAME: 1024, "build.json": 1}
    assert store.copy(NAME, "export/x")
    assert store.holds("export/x", digest)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s4://bucket/a", "no protocol 's4'. It knows s3"),
        ("wibble://bucket/a", "no protocol 'wibble'. It knows s3"),
        ("s3://bucket/a", r"pip install 'nf4-pipeline\[s3\]'"),
        ("gs://bucket/a", "Install it: pip install 'gcsfs'"),
        ("abfs://bucket/a", "Install it: pip install 'adlfs'"),
        ("sftp://host/a", "Install it: pip install 'paramiko'"),
        ("smb://host/a", "Install it: pip install 'smbprotocol'"),
    ],
)
def test_a_client_that_is_not_there(url: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = importlib.import_module("fsspec.registry")._registry
    clients = {"s3fs": "s3", "gcsfs": "gs", "adlfs": "abfs", "paramiko": "sftp"}
    for package, protocol in (clients | {"smbclient": "smb"}).items():
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(opened, protocol, raising=False)
    with pytest.raises(UsageError, match=said):
        ObjectStore(url).names()


@pytest.mark.parametrize("place", ["/dev/null/store", "/proc/store", "{file}/store"])
def test_a_folder_that_cannot_be_made(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ObjectStore(f"file://{place.format(file=tmp_path / 'file')}", patience=1.0)
    with pytest.raises(StoreError, match="name another --build-dir"):
        store.check_writable()


class TestS3:
    """What only a server can refuse; and a server that dies."""

    @pytest.mark.parametrize(
        ("bucket", "key", "said"),
        [
            ("absent", "testing", "no such bucket or folder"),
            ("In_valid..Name", "testing", "bucket"),
            ("bucket", "", "no credentials were found"),
        ],
    )
    def test_refusals(
        self,
        bucket: str,
        key: str,
        said: str,
        tmp_path: Path,
        server: S3Server,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        for name in () if key else ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        forget_clients()
        store = ObjectStore(f"s3://{bucket}/a", patience=1.0)
        for call in (store.names, store.check_writable):
            with pytest.raises(StoreError, match=said):
                call()
        forget_clients()

    def test_no_right_to_it(self, server: S3Server) -> None:
        server.ask("POST", "/moto-api/reset-auth", b"0")  # from now on, rights are looked at
        try:
            store = ObjectStore("s3://bucket/a", patience=1.0)
            with pytest.raises(StoreError, match="permission denied"):
                store.names()
            with pytest.raises(StoreError, match=r"list, read, write and delete"):
                store.check_writable()
        finally:
            server.ask("POST", "/moto-api/reset-auth", b"inf")

    def test_a_server_that_dies_and_comes_back(
        self, server: S3Server, made: tuple[Path, FileDigest]
    ) -> None:
        path, digest = made
        url = fresh_url("s3", path)
        ObjectStore(url).put("1", path, digest)
        server.kill()
        with pytest.raises(StoreError, match=r"tried for .* the same command again") as lost:
            ObjectStore(url, patience=0.6).put("2", path, digest)
        assert "write 2" in str(lost.value)
        told: list[str] = []
        comes_back = threading.Timer(0.3, server.start)
        comes_back.start()
        patient = ObjectStore(url, patience=60.0)
        patient.say = told.append
        patient.put("3", path, digest)
        comes_back.join()
        assert [text.partition(" cannot ")[2][:8] for text in told] == ["write 3:"]
        assert ObjectStore(url).names() == {"1": 1024, "3": 1024}
        assert ObjectStore(url).holds("1", digest)
