"""Odd places: caches that fail, links where folders were, disks that lack calls, small limits.

`scripts/campaigns/odd_places.py` runs whole commands there.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numba
import pytest
from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.atomic import partial_of, sync_folder, write_bytes
from nf4_pipeline.compiled import compiled
from nf4_pipeline.errors import (
    AccessError,
    BuildError,
    PipelineError,
    ResourceError,
    is_of_machine,
    of_system,
)
from nf4_pipeline.readers import decoded, stock_reader
from numba.core import config

from tests.campaigns.odd_places import can_be_root, run
from tests.campaigns.odd_places_cases import CASES
from tests.support.jobs import download
from tests.support.tiny import content_of, copy_of, nf4


def failing(number: int) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


def _one_more(x: int) -> int:
    return x + 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where numba keeps what it compiles."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_compiled_is_kept(cache: Path) -> None:
    for hits in (0, 1):
        made: Any = compiled()(_one_more)
        assert made(1) == 2
        assert sum(made.stats.cache_hits.values()) == hits
        assert list(cache.rglob("*.nbc")) != []


@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
@pytest.mark.parametrize("content", [b"", b"x", b"\x80\x04N."], ids=["empty", "noise", "None"])
def test_a_damaged_cache_costs_a_compilation(cache: Path, ending: str, content: bytes) -> None:
    first: Any = compiled()(_one_more)
    assert first(1) == 2
    for path in cache.rglob(f"*{ending}"):
        path.write_bytes(content)
    assert compiled()(_one_more)(1) == 2
    again: Any = compiled()(_one_more)
    assert again(1) == 2
    assert sum(again.stats.cache_hits.values()) == 1  # it is mended


def test_a_cache_on_a_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = compiled()(_one_more)
    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "_save_index", failing(errno.ENOSPC))
    assert made(1) == 2


def test_no_place_for_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.caching.tempfile, "TemporaryFile", failing(errno.EROFS))
    assert compiled()(_one_more)(1) == 2


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Files of the user's own."""
    folder = tmp_path / "mine"
    (folder / "folder").mkdir(parents=True)
    for name in ("file", "folder/x", ".y.partial"):
        (folder / name).write_text("mine")
    (folder / "link").symlink_to("file")
    return folder


OWN = ("source", "converted", "quantized", "export", "calibration", "records")


@pytest.mark.parametrize("name", OWN)
def test_a_link_in_the_place_of_a_folder(tmp_path: Path, mine: Path, name: str) -> None:
    """A stage would empty the folder that it leads to."""
    before = content_of(mine)
    root = tmp_path / "build"
    root.mkdir()
    (root / name).symlink_to(mine)
    with pytest.raises(BuildError, match=f"{name} is a link"), Build(root).locked():
        pass
    assert content_of(mine) == before
    assert (mine / "link").is_symlink()


def test_the_build_folder_itself_may_be_a_link(tmp_path: Path, mine: Path) -> None:
    (tmp_path / "build").symlink_to(mine)
    with Build(tmp_path / "build").locked():
        assert (mine / ".lock").is_file()


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "broken link"])
def test_what_is_no_lock(tmp_path: Path, mine: Path, kind: str) -> None:
    root = tmp_path / "build"
    root.mkdir()
    lock = root / ".lock"
    if kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(mine / ("file" if kind == "link" else "new"))
    with (
        pytest.raises(BuildError, match=r"no plain file.*Delete it|is a link"),
        Build(root).locked(),
    ):
        pass
    assert (mine / "file").read_text() == "mine"
    assert not (mine / "new").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with pytest.raises(BuildError, match=r"no locks.*--build-dir"), Build(tmp_path).locked():
        pass


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.usefixtures("workers_here")
def test_a_file_system_without_links(
    tiny_falcon: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "symlink_to", failing(number))
    with pytest.raises(AccessError, match=r"no symbolic links.*Name a --build-dir"):
        download(tiny_falcon, tmp_path / "artifacts")


def test_nothing_is_written_through_a_link(tmp_path: Path, mine: Path) -> None:
    partial_of(tmp_path / "x.json").symlink_to(mine / "file")
    write_bytes(tmp_path / "x.json", b"new")
    assert (mine / "file").read_text() == "mine"
    assert (tmp_path / "x.json").read_bytes() == b"new"


@pytest.mark.parametrize(("mask", "mode"), [(0o77, 0o600), (0o22, 0o644), (0o2, 0o664)])
def test_files_are_as_the_umask_says(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "x", b"")
        with Build(tmp_path / "build").locked():
            pass
    finally:
        os.umask(before)
    for path in (tmp_path / "x", tmp_path / "build" / ".lock"):
        assert path.stat().st_mode & 0o777 == mode


def test_folders_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)


NO_TEMPORARY = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")


@pytest.mark.parametrize(
    ("error", "kind", "remedy"),
    [
        (OSError(errno.EMFILE, "Too many open files", "a/b"), ResourceError, "ulimit -n"),
        (OSError(errno.ENFILE, "Too many open files"), ResourceError, "ulimit -n"),
        (BlockingIOError(errno.EAGAIN, "Try again"), ResourceError, "ulimit -u"),
        (RuntimeError("can't start new thread"), ResourceError, "ulimit -u"),
        (FileExistsError(errno.EEXIST, "File exists", "a/b"), AccessError, "Move it away"),
        (OSError(errno.ENOSYS, "No such function", "a/b"), AccessError, "--build-dir"),
        (NO_TEMPORARY, AccessError, "TMPDIR"),
        (OSError(errno.ENOMEM, "no memory"), ResourceError, "memory"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_each_limit_has_its_remedy(
    error: OSError | RuntimeError, kind: type[PipelineError], remedy: str
) -> None:
    found = of_system(error, "quantize")
    assert type(found) is kind
    assert remedy in str(found)
    assert "disk" not in str(found)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSPC, errno.EIO, errno.EAGAIN])
def test_a_fault_of_the_machine_is_no_verdict(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded, "_names_wrong", failing(number))
    with pytest.raises(OSError, match=r"."):
        decoded.decode_with_numpy(tmp_path, {})
    monkeypatch.setattr(decoded, "_names_wrong", failing(errno.ENOENT))
    assert decoded.decode_with_numpy(tmp_path, {}).outcome == "failed"


def test_the_stock_reader_knows_the_machine_too() -> None:
    assert all(is_of_machine(OSError(number, "")) for number in stock_reader.OF_THE_MACHINE)


@pytest.mark.parametrize(
    "args", [("download", ""), ("quantize", "--build-dir", ""), ("prompt", "", "x")]
)
def test_an_empty_name_is_no_folder(tmp_path: Path, args: tuple[str, ...]) -> None:
    """As of a variable that is not set; Python takes it for the working folder."""
    done = nf4(*args, cwd=tmp_path)
    assert done.status == 2
    assert "empty" in done.err
    assert list(tmp_path.iterdir()) == []


QUICK = [case for case in CASES if case.quick]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.item}: {case.name}")
def test_whole_commands(
    case: Any, downloaded_falcon: Path, tiny_falcon: Path, tmp_path: Path
) -> None:
    if case.root and not can_be_root():
        pytest.skip("needs root")
    places = {"downloaded": copy_of(downloaded_falcon, tmp_path / "d"), "model": tiny_falcon}
    seen = run(case, places, tmp_path / "place")
    assert seen.faults == [], seen.text
