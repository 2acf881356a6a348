"""Files that are complete or absent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from nf4_pipeline.checkpoint import atomic as durable
from nf4_pipeline.checkpoint.atomic import (
    check_can_be_made,
    json_bytes,
    link_or_copy,
    remove_leftovers,
    replacing,
    write_bytes,
    write_json,
)
from nf4_pipeline.errors import AccessError


class Stop(BaseException):
    """Something that is not even an Exception, as an interrupt is."""


def write_and_raise(path: Path, error: type[BaseException]) -> None:
    with replacing(path) as descriptor:
        os.write(descriptor, b"half of the new")
        raise error


def test_a_new_file_and_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.bin"
    write_bytes(path, b"12345")
    assert path.read_bytes() == b"12345"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
def test_an_exception_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "new.bin"
    with pytest.raises(error):
        write_and_raise(path, error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
def test_an_exception_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "old.bin"
    write_bytes(path, b"old")
    before = path.stat()
    with pytest.raises(error):
        write_and_raise(path, error)
    assert path.read_bytes() == b"old"
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")
    with replacing(path) as descriptor:
        os.write(descriptor, b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_a_shorter_file_replaces_a_longer_one_and_a_longer_leftover(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    write_bytes(path, b"long content")
    (tmp_path / ".file.bin.partial").write_bytes(b"left by a process that was killed")
    write_bytes(path, b"x")
    assert path.read_bytes() == b"x"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file_and_a_leftover_that_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")
    program = (
        "import os, signal, sys; from pathlib import Path;"
        "from nf4_pipeline.checkpoint.atomic import replacing\n"
        "with replacing(Path(sys.argv[1])) as descriptor:\n"
        "    os.write(descriptor, b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_stored_in_one_way(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": 1, "a": ["é"]})
    assert (tmp_path / "x.json").read_text("utf-8") == '{\n  "b": 1,\n  "a": [\n    "é"\n  ]\n}\n'
    assert json.loads(json_bytes({"x": 0.1})) == {"x": 0.1}
    with pytest.raises(ValueError, match="JSON compliant"):
        json_bytes({"x": float("nan")})


def test_a_link_shares_the_bytes_and_replaces_what_was_there(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"content")
    target.write_bytes(b"old")
    assert link_or_copy(source, target)
    assert target.samefile(source)


def test_bytes_are_copied_where_no_link_can_be(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    source = other / f"nf4-test-{os.getpid()}"
    try:
        source.write_bytes(b"content" * 10_000)
        assert not link_or_copy(source, tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == source.read_bytes()
        assert [p.name for p in tmp_path.iterdir()] == ["b"]
    finally:
        source.unlink()


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_takes_its_place_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """Also where the system cannot exchange two names."""
    if not exchange:
        monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    folder = tmp_path / "export"
    for number in (1, 2):
        with durable.replacing_folder(folder) as fresh:
            (fresh / f"{number}.txt").write_text("new")
            assert folder.exists() == (number == 2)
        assert [path.name for path in folder.iterdir()] == [f"{number}.txt"]
    with pytest.raises(IsADirectoryError), durable.replacing_folder(folder) as fresh:
        fresh.write_text("half")
    assert [path.name for path in folder.iterdir()] == ["2.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_folder_whose_exchange_was_killed_is_put_back(tmp_path: Path) -> None:
    """Between two renames, where there is no exchange: the earlier one counts."""
    folder = tmp_path / "export"
    with pytest.MonkeyPatch.context() as patch, durable.replacing_folder(folder) as fresh:
        (fresh / "1.txt").write_text("old")
        patch.setattr(durable, "_exchange", lambda *_: False)
    folder.rename(tmp_path / ".export-old.partial")
    (tmp_path / ".export.partial").mkdir()
    durable.recover_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert [path.name for path in folder.iterdir()] == ["1.txt"]
    durable.recover_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("target", ["precious.txt", "new.txt", ".x.json.partial"])
def test_a_link_in_the_place_of_the_half_file_is_not_followed(tmp_path: Path, target: str) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".x.json.partial").symlink_to(tmp_path / target)
    write_json(folder / "x.json", {})
    assert precious.read_text() == "mine"
    assert [path.name for path in folder.iterdir()] == ["x.json"]
    assert not (tmp_path / "new.txt").exists()


@pytest.mark.parametrize("place", ["/proc/none", "/proc/none/deeper", "file/build", "gone/build"])
def test_a_folder_that_cannot_be_made(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(AccessError, match=f"{place} cannot be made.*another --build-dir"):
        check_can_be_made(tmp_path / place)


@pytest.mark.parametrize("place", [".", "new", "new/and/deeper"])
def test_a_folder_that_can_be_made(place: str, tmp_path: Path) -> None:
    check_can_be_made(tmp_path / place)
    assert not list(tmp_path.iterdir())
