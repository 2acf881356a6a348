"""What lies where a file should: pipes, devices, folders, sparse files of 3 GB, loops of links.

Each reader of a file that a stranger or a user names gives one error of ours, or says that there is
nothing, without waiting and without reading gigabytes.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
from nf4_pipeline.build_folder.record import read_record
from nf4_pipeline.calibration.tokens import read_tokens, tokens_of_text
from nf4_pipeline.checkpoint.digest import FileDigest, digest_file, digest_tensors
from nf4_pipeline.checkpoint.folder_advice import adapter_advice, without_config
from nf4_pipeline.checkpoint.lfs_pointer import is_lfs_pointer
from nf4_pipeline.checkpoint.plain_file import read_beginning, read_plain
from nf4_pipeline.checkpoint.safetensors_header import read_header
from nf4_pipeline.checkpoint.source import open_checkpoint, read_json
from nf4_pipeline.checkpoint.source_card import read_card
from nf4_pipeline.checkpoint.strip_prefix import copy_without_prefix
from nf4_pipeline.checkpoint.untrusted import check_file, check_folder
from nf4_pipeline.errors import PipelineError, SignatureError, UnfitFileError, of_system
from nf4_pipeline.hub.cache import are_blobs
from nf4_pipeline.manifest.read import read_manifest
from nf4_pipeline.manifest.small_files import tokenizer_config
from nf4_pipeline.pickles.scan import scan
from nf4_pipeline.progress import SILENT
from nf4_pipeline.provenance import signing
from nf4_pipeline.recipe import Recipe, load_recipe
from nf4_pipeline.records import KINDS
from nf4_pipeline.verification.eval_text import read_text
from nf4_pipeline.verification.prompts import read_prompts

from tests.support.signed import make_keys
from tests.support.tiny import copy_of, environment

GB: Final = 10**9
NOISE: Final = bytes(range(256)) * 8
SECONDS: Final = 60
MEMORY: Final = 300 * 10**6


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def socket_(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket has at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 * GB)


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to("one")
    path.with_name("one").symlink_to("other")
    path.with_name("other").symlink_to("one")


def link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def empty(path: Path) -> None:
    path.touch()


def noise(path: Path) -> None:
    path.write_bytes(NOISE)


LYING: Final = {
    make.__name__: make
    for make in (pipe, device, socket_, sparse, folder, loop, link_to_a_pipe, empty, noise)
}
KEYS: Final[dict[str, Path]] = {}


@pytest.fixture(scope="module", autouse=True)
def keys(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A pair of keys, and an artifact to check with them."""
    home = tmp_path_factory.mktemp("keys")
    KEYS["private"], KEYS["public"] = make_keys(home, "key")
    KEYS["artifact"] = home / "artifact"
    KEYS["artifact"].mkdir()
    (KEYS["artifact"] / "manifest.json").write_text("{}")
    (KEYS["artifact"] / "model.sig").write_text("{}")


def named(name: str, read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A reader of a folder, in which the file has this name."""

    def reader(path: Path) -> Any:
        path.rename(path.with_name(name))
        return read(path.parent)

    return reader


NO_WORDS: Final[Any] = SimpleNamespace(
    ids=lambda text: [], ids_all_over=lambda text, places, room: [], prefix=list
)


def signature(path: Path) -> int:
    artifact = path.parent
    path.rename(artifact / "model.sig")
    (artifact / "manifest.json").write_text("{}")
    return signing.check(artifact, KEYS["public"])


def among_others(path: Path) -> int:
    """An artifact in which the file lies beside what is signed."""
    (path.parent / "manifest.json").write_text("{}")
    (path.parent / "model.sig").write_text("{}")
    return signing.check(path.parent, KEYS["public"])


def index(path: Path) -> Any:
    (path.parent / "config.json").write_text("{}")
    path.rename(path.with_name("model.safetensors.index.json"))
    return open_checkpoint(path.parent)


def copied(path: Path) -> Any:
    """A tokenizer that is copied while a prefix is taken away."""
    source = path.parent
    path.rename(source / "tokenizer.json")
    (source / "config.json").write_text("{}")
    header = b'{"a.b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    files = {"model.safetensors": FileDigest(0, ""), "tokenizer.json": FileDigest(0, "")}
    made = copy_without_prefix(source, files, "a.", source / "converted", SILENT)
    return made["tokenizer.json"] == digest_file(source / "tokenizer.json")


def snapshot(path: Path) -> Any:
    """The main ref of a cache of the Hub, looked at for advice."""
    root = path.parent / "models--a--b"
    (root / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (root / "refs").mkdir()
    path.rename(root / "refs" / "main")
    return without_config(root)


READERS: Final[dict[str, Callable[[Path], Any]]] = {
    "config": read_json,
    "weights": read_header,
    "hash": lambda path: digest_file(path).size,
    "hash of tensors": lambda path: digest_tensors(path, read_header(path))[0],
    "pointer": is_lfs_pointer,
    "card": lambda path: read_card(path).metadata(),
    "tokenizer": named("tokenizer.json", lambda found: check_file(found, "tokenizer.json")),
    "a folder's tokenizer": named("tokenizer_config.json", check_folder),
    "a folder's license": named("LICENSE", check_folder),
    "a folder's weights": named("model.safetensors", open_checkpoint),
    "a folder's index": index,
    "a folder's config": named("config.json", open_checkpoint),
    "an adapter's config": named("adapter_config.json", adapter_advice),
    "tokenizer config": tokenizer_config,
    "tokenizer, copied": copied,
    "manifest": named("manifest.json", read_manifest),
    "record": lambda path: read_record(path, KINDS["download"]),
    "recipe": load_recipe,
    "text": read_text,
    "prompts": read_prompts,
    "calibration text": lambda path: tokens_of_text(path, NO_WORDS, 8, 8),
    "kept tokens": read_tokens,
    "pickle": scan,
    "private key": lambda path: signing.sign(KEYS["artifact"], path),
    "public key": lambda path: signing.check(KEYS["artifact"], path),
    "signature": signature,
    "file of a signed artifact": among_others,
    "ref": snapshot,
}
LEGAL: Final = {
    ("hash", "empty"): 0,
    ("hash", "noise"): 2048,
    ("recipe", "empty"): Recipe(),
    ("tokenizer config", "empty"): b"",
    ("tokenizer config", "noise"): NOISE,
    ("tokenizer, copied", "empty"): True,
    ("tokenizer, copied", "noise"): True,
}
SLOW: Final = {("hash", "sparse")}  # to hash 3 GB is legal


@pytest.fixture
def bounded() -> Iterator[None]:
    """Ends what waits for ever, and refuses memory."""

    def late(*_: object) -> None:
        raise AssertionError(f"it took more than {SECONDS} s")

    now = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmData:")
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


CASES: Final = [(role, lying) for role in READERS for lying in LYING if (role, lying) not in SLOW]


def outcome(read: Callable[[Path], Any], path: Path) -> Any:
    """What a reader gives, or its error; what is no error of ours passes."""
    try:
        return read(path)
    except PipelineError as error:
        return error
    except OSError as error:  # the command line makes one line of it; never of a file that is there
        if error.errno != errno.ELOOP:
            raise
        return of_system(error, "read")


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(("role", "lying"), CASES)
def test_one_error_and_no_waiting(role: str, lying: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    LYING[lying](place / "file")
    found = outcome(READERS[role], place / "file")
    if (role, lying) in LEGAL:
        assert found == LEGAL[role, lying]
    elif isinstance(found, PipelineError):
        assert str(found).count("\n") == 0
        assert len(str(found)) < 900 + 3 * len(str(tmp_path))
    else:  # nothing, or advice on the folder
        assert found in (None, False, {}) or type(found) is str


@pytest.mark.usefixtures("bounded")
def test_no_file_is_hashed_for_a_signature_that_is_none(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(1000 * GB)
    with pytest.raises(SignatureError, match="is not what was signed with that key"):
        among_others(tmp_path / "model.safetensors")


@pytest.mark.parametrize("make", [pipe, device, socket_, folder, link_to_a_pipe])
def test_it_says_what_lies_there(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "file")
    with pytest.raises(UnfitFileError, match=r"it is a \w+, not a plain file\. Name or") as caught:
        read_plain(tmp_path / "file", 10)
    assert str(caught.value.strerror) in str(caught.value)


def test_the_limit_is_that_of_the_caller(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_plain(tmp_path / "file", 5) == b"12345"
    assert read_beginning(tmp_path / "file", 3) == b"123"
    with pytest.raises(UnfitFileError, match=r"it has 5 bytes; no real one has more than 4"):
        read_plain(tmp_path / "file", 4)


def test_a_file_that_claims_no_bytes_is_read_no_further_than_allowed() -> None:
    """As one that grows while it is read."""
    assert Path("/proc/self/maps").stat().st_size == 0
    with pytest.raises(UnfitFileError, match="it grew beyond 100 bytes"):
        read_plain(Path("/proc/self/maps"), 100)


def test_a_cached_file_of_any_size_is_hashed_in_pieces(bounded: None, tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / ("0" * 40)
    blob.parent.mkdir()
    with blob.open("wb") as file:
        file.truncate(4 * MEMORY // 3)
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "x").symlink_to(Path("..", "blobs", blob.name))
    assert not are_blobs(tmp_path / "snapshots", {"x": FileDigest(4 * MEMORY // 3, "")})


def command(*args: str | Path, cwd: Path) -> tuple[int, str]:
    """A whole command with little memory; it must end by itself."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (2 * GB, 2 * GB))

    done = subprocess.run(
        [sys.executable, "-m", "nf4_pipeline", *map(str, args)],
        cwd=cwd,
        env=environment(cwd),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=limit,
    )
    return done.returncode, done.stderr.strip()


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (("check", "--key", "/dev/zero", "export"), 2, "/dev/zero cannot be read: it is a device"),
        (("check", "--key", "pipe", "export"), 2, "pipe cannot be read: it is a pipe"),
        (("sign", "--key", "sparse", "export"), 2, "it has 3,000,000,000 bytes"),
        (("inspect", "with-pipe"), 1, "manifest.json cannot be read: it is a pipe"),
        (("inspect", "with-sparse"), 1, "manifest.json cannot be read: it has 3,000,000,000 bytes"),
        (("build", "model"), 1, "tokenizer.json is not a file"),
        (("build", "model", "--recipe", "/dev/zero"), 2, "it is a device, not a plain file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_command_ends_with_one_error(
    args: tuple[str, ...],
    status: int,
    said: str,
    exported_falcon: Path,
    tiny_falcon: Path,
    tmp_path: Path,
) -> None:
    copy_of(exported_falcon / "export", tmp_path / "export")
    (tmp_path / "export" / "model.sig").write_text(json.dumps({}))
    pipe(tmp_path / "pipe")
    sparse(tmp_path / "sparse")
    for name, make in (("with-pipe", pipe), ("with-sparse", sparse)):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "export" / "config.json", tmp_path / name)
        make(tmp_path / name / "manifest.json")
    model = copy_of(tiny_falcon, tmp_path / "model")
    (model / "tokenizer.json").unlink(missing_ok=True)
    pipe(model / "tokenizer.json")
    found, err = command(*args, cwd=tmp_path)
    assert (found, "Traceback" in err) == (status, False), err
    assert said in err
