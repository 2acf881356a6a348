"""An output file: written by many threads at once, hashed on the way, complete or absent."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.checkpoint.digest import digest_file, digest_tensors
from nf4_pipeline.checkpoint.layout import FileLayout, StoredTensor, plan_layout
from nf4_pipeline.checkpoint.safetensors_header import read_header
from nf4_pipeline.checkpoint.writer import writing
from safetensors.numpy import load_file


def layout_of(sizes: dict[str, int]) -> FileLayout:
    return plan_layout(StoredTensor(name, "U8", (size,), size) for name, size in sizes.items())


def test_parts_written_by_many_threads_in_any_order(tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    content = {f"t{i}": dice.bytes(100_000 + 13 * i) for i in range(12)}
    layout = layout_of({name: len(data) for name, data in content.items()})
    path = tmp_path / "m.safetensors"
    step = 7_001
    parts = [(n, s, d[s : s + step]) for n, d in content.items() for s in range(0, len(d), step)]
    dice.shuffle(parts)
    with writing(path, layout) as output:
        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(output.write, n, int(s), d) for n, s, d in parts]:
                future.result()
        written = output.finish()
    assert {n: a.tobytes() for n, a in load_file(path).items()} == content
    assert written.digest == digest_file(path)
    assert written.sha256 == {n: hashlib.sha256(d).hexdigest() for n, d in content.items()}
    assert (written.digest, written.sha256) == digest_tensors(path, written.tensors)
    assert written.tensors == read_header(path)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 39), max_size=12),
    dice=st.randoms(use_true_random=False),
)
def test_any_partition_in_any_order(sizes: list[int], cuts: list[int], dice: Random) -> None:
    """Gaps of any kind: what stands behind one is hashed once it is closed."""
    content = {f"t{i}": dice.randbytes(size) for i, size in enumerate(sizes)}
    parts = []
    for name, data in content.items():
        places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
        parts += [(name, start, data[start:end]) for start, end in pairwise(places)]
    dice.shuffle(parts)
    with TemporaryDirectory() as folder:
        path = Path(folder, "m.safetensors")
        with writing(path, layout_of({n: len(d) for n, d in content.items()})) as output:
            for part in parts:
                output.write(*part)
            written = output.finish()
        assert written.digest == digest_file(path)
        assert {n: a.tobytes() for n, a in load_file(path).items()} == content
    assert written.sha256 == {n: hashlib.sha256(d).hexdigest() for n, d in content.items()}


def test_arrays_of_any_dtype_and_empty_tensors(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    layout = plan_layout(
        [
            StoredTensor("values", "F32", (2, 3), 24),
            StoredTensor("empty", "F32", (0, 3), 0),
            StoredTensor("given", "F32", (0,), 0),
        ]
    )
    path = tmp_path / "m.safetensors"
    with writing(path, layout) as output:
        output.write("values", 0, values)
        output.write("given", 0, np.empty(0, np.float32))
        written = output.finish()
    assert load_file(path)["values"].tolist() == values.tolist()
    assert written.sha256["empty"] == hashlib.sha256(b"").hexdigest()


def test_a_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with writing(path, layout_of({})) as output:
        written = output.finish()
    assert read_header(path) == ()
    assert written.digest == digest_file(path)


def test_bytes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with (
        pytest.raises(ValueError, match="a: 11 bytes do not fit 10"),
        writing(path, layout_of({"a": 10, "b": 10})) as output,
    ):
        output.write("a", 5, b"123456")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_was_forgotten(tmp_path: Path) -> None:
    def forget() -> None:
        with writing(tmp_path / "m.safetensors", layout_of({"a": 1, "b": 2})) as output:
            output.write("a", 0, b"x")
            output.finish()

    with pytest.raises(RuntimeError, match="1 tensors were not written, such as b"):
        forget()
    assert list(tmp_path.iterdir()) == []


def test_a_body_that_forgets_to_finish_leaves_no_half_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(RuntimeError), writing(path, layout_of({"a": 1, "b": 2})) as output:
        output.write("a", 0, b"x")
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_neither_a_file_nor_a_thread(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    before = threading.active_count()

    def fail() -> None:
        with writing(path, layout_of({"a": 1, "b": 2})) as output:
            output.write("b", 0, b"xy")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    assert threading.active_count() == before
