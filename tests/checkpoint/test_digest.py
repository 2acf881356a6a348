"""One hash over files stands for these files and no others."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.checkpoint.digest import FileDigest, FileStamp, content_sha256

ONE, TWO = FileDigest(1, "1" * 64), FileDigest(2, "2" * 64)

# Few characters, among them all that the lines are made of: what collides is found soon.
names = st.text(st.sampled_from("a12 \\\n\rnr"), min_size=1, max_size=4) | st.builds(
    "{}\n{}  {}".format, st.sampled_from("ab"), st.sampled_from(["1" * 64, "2" * 64]), st.just("b")
)
folders = st.dictionaries(names, st.sampled_from([ONE, TWO]), max_size=3)


@given(folders, folders)
def test_two_folders_of_one_hash_are_the_same(
    one: dict[str, FileDigest], other: dict[str, FileDigest]
) -> None:
    assert (content_sha256(one) == content_sha256(other)) == (one == other)


def test_a_newline_in_a_name_makes_no_second_file() -> None:
    two = {"a": ONE, "b": TWO}
    one = {f"a\n{TWO.sha256}  b": ONE}
    assert content_sha256(one) != content_sha256(two)
    assert content_sha256({"a\\nb": ONE}) != content_sha256({"a\nb": ONE})


def test_ordinary_names_have_the_hash_that_they_had() -> None:
    files = {"model.safetensors": ONE, "additional_chat_templates/ü x.jinja": TWO}
    lines = sorted(f"{digest.sha256}  {name}\n" for name, digest in files.items())
    assert content_sha256(files) == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_the_lines_are_those_of_sha256sum(tmp_path: Path) -> None:
    """Names as awkward as a file system takes them, one that is not UTF-8 among them."""
    paths = ["plain", "a b", "new\nline", "back\\slash", "both\\\n", "caf\udce9"]
    files = {}
    for number, name in enumerate(paths):
        content = str(number).encode()
        (tmp_path / name).write_bytes(content)
        files[name] = FileDigest.of(content)
    done = subprocess.run(
        ["sha256sum", "--", *(os.fsencode(name) for name in paths)],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    lines = b"".join(sorted(done.stdout.splitlines(keepends=True)))
    assert content_sha256(files) == hashlib.sha256(lines).hexdigest()


def test_a_stamp_tells_what_a_kept_time_hides(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    before = FileStamp.of(path)
    assert FileStamp.of(path) == before
    path.write_bytes(b"two")
    os.utime(path, ns=(before.mtime_ns, before.mtime_ns))
    now = FileStamp.of(path)
    assert (now.size, now.mtime_ns) == (before.size, before.mtime_ns)
    assert now != before


def test_of_a_link_the_target_counts(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    before = FileStamp.of(tmp_path / "link")
    assert before == FileStamp.of(tmp_path / "file")
    (tmp_path / "file").unlink()
    (tmp_path / "file").write_bytes(b"two")
    assert FileStamp.of(tmp_path / "link") != before
