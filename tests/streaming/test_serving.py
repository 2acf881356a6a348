"""Bytes of tensors from another process: those of the file, each fetched once, or words."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from nf4_pipeline.blocks.block_reader import BlockReader, TensorGroup
from nf4_pipeline.checkpoint.source import Checkpoint, open_checkpoint
from nf4_pipeline.errors import CheckpointError, HubError, NotFoundError, PipelineError
from nf4_pipeline.progress import SILENT
from nf4_pipeline.streaming import serving as module
from nf4_pipeline.streaming import stretches as cutting
from nf4_pipeline.streaming.passing import Passing
from nf4_pipeline.streaming.reading import FileBytes, ServedBytes, TensorBytes
from nf4_pipeline.streaming.serving import Stretches, serving
from nf4_pipeline.streaming.stretches import Fetch, PassedFile
from safetensors.numpy import load_file, save_file

FILE = "model.safetensors"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of one file, in stretches of 3,000 bytes."""
    monkeypatch.setattr(cutting, "LARGEST", 3000)
    folder = tmp_path / "source"
    folder.mkdir()
    dice = np.random.default_rng(0)
    shapes = {"embed": (300, 20), **{f"h.{i}.{n}": (20, 9 + i) for i in range(4) for n in "abc"}}
    tensors = {name: dice.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / FILE)
    (folder / "config.json").write_text("{}")
    return folder


def passed(source: Path) -> dict[str, PassedFile]:
    headers = [tensor.header for tensor in open_checkpoint(source).tensors]
    whole = (source / FILE).read_bytes()
    header = whole[: headers[0].offset]
    fetch = from_file(source)
    with Passing.whole(FILE, len(whole), header, headers, (), fetch, SILENT) as passing:
        return {FILE: passing.finish()}


def from_file(source: Path) -> Fetch:
    whole = (source / FILE).read_bytes()
    return lambda file, start, end: whole[start:end]


@contextmanager
def served(source: Path, fetch: Fetch, at: Path) -> Iterator[ServedBytes]:
    with serving(Stretches(passed(source), fetch), at):
        reader = ServedBytes(at)
        try:
            yield reader
        finally:
            reader.close()


def read_all(checkpoint: Checkpoint, source: TensorBytes) -> dict[str, bytes]:
    with BlockReader(source) as reader:
        return {t.name: reader.read(t).numpy().tobytes() for t in checkpoint.tensors}


@pytest.mark.parametrize("where", ["here", "a folder with a long name " * 8])
def test_the_bytes_are_those_of_the_files(source: Path, tmp_path: Path, where: str) -> None:
    """A socket's address has at most a hundred characters; a folder may have more."""
    checkpoint = open_checkpoint(source)
    wanted = {name: array.tobytes() for name, array in load_file(source / FILE).items()}
    assert read_all(checkpoint, FileBytes(checkpoint)) == wanted
    folder = tmp_path / where.strip()
    folder.mkdir()
    with served(source, from_file(source), folder / "socket") as reader:
        assert read_all(checkpoint, reader) == wanted
    assert not list(folder.iterdir())


def test_each_stretch_is_fetched_once(source: Path, tmp_path: Path) -> None:
    """Block by block, as a model is read, many threads at once."""
    asked, lock = [], threading.Lock()
    inner = from_file(source)

    def fetch(file: str, start: int, end: int) -> bytes:
        with lock:
            asked.append((start, end))
        return inner(file, start, end)

    checkpoint = open_checkpoint(source)
    with served(source, fetch, tmp_path / "socket") as reader, BlockReader(reader) as blocks:
        for block in ("embed", *(f"h.{i}." for i in range(4))):
            group = TensorGroup.of([t for t in checkpoint.tensors if t.name.startswith(block)])
            for part in blocks.start(group, torch.zeros(group.nbytes, dtype=torch.uint8)):
                part.result()
    assert sorted(asked) == [(s.start, s.end) for s in passed(source)[FILE].stretches]


def test_what_nobody_asks_for_is_not_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEPT", 2)
    held = Stretches(passed(source), from_file(source))
    for stretch in passed(source)[FILE].stretches:
        list(held.read(FILE, stretch.start, 1))
        assert len(held._held) == len(held._left) <= 2


def test_wrong_bytes_are_fetched_again_once(source: Path, tmp_path: Path) -> None:
    right, tries = from_file(source), list[int]()

    def wrong(times: int) -> Fetch:
        tries.clear()

        def fetch(file: str, start: int, end: int) -> bytes:
            tries.append(start)
            data = right(file, start, end)
            return bytes(len(data)) if len(tries) <= times else data

        return fetch

    checkpoint = open_checkpoint(source)
    tensor = checkpoint.tensors[-1]
    into = memoryview(bytearray(tensor.header.nbytes))
    with served(source, wrong(1), tmp_path / "socket") as reader:
        reader.read(tensor, 0, into)
    assert bytes(into) == load_file(source / FILE)[tensor.name].tobytes()
    assert len(tries) == 2
    with (
        served(source, wrong(2), tmp_path / "socket") as reader,
        pytest.raises(HubError, match="came wrong twice: expected sha256"),
    ):
        reader.read(tensor, 0, into)


@pytest.mark.parametrize("error", [NotFoundError("It is gone."), HubError("No answer.")])
def test_what_the_hub_says_reaches_who_asked(
    error: PipelineError, source: Path, tmp_path: Path
) -> None:
    """And those who wait for the same stretch; then it is asked for again."""

    def refuse(file: str, start: int, end: int) -> bytes:
        raise error

    tensor = open_checkpoint(source).tensors[-1]

    def read(reader: ServedBytes) -> str:
        with pytest.raises(type(error)) as raised:
            reader.read(tensor, 0, memoryview(bytearray(8)))
        return str(raised.value)

    with (
        served(source, refuse, tmp_path / "socket") as reader,
        ThreadPoolExecutor(4) as pool,
    ):
        assert set(pool.map(read, [reader] * 8)) == {str(error)}


def test_who_serves_may_end(source: Path, tmp_path: Path) -> None:
    tensor = open_checkpoint(source).tensors[0]
    with served(source, from_file(source), tmp_path / "socket") as reader:
        reader.read(tensor, 0, memoryview(bytearray(8)))
    reader = ServedBytes(tmp_path / "socket")
    with pytest.raises(OSError, match="No such file"):
        reader.read(tensor, 0, memoryview(bytearray(8)))
    reader.close()


def test_a_file_that_became_shorter(source: Path) -> None:
    checkpoint = open_checkpoint(source)
    reader = FileBytes(checkpoint)
    with (source / FILE).open("r+b") as file:
        file.truncate(checkpoint.tensors[-1].header.offset)
    with pytest.raises(CheckpointError, match="became shorter"):
        reader.read(checkpoint.tensors[-1], 0, memoryview(bytearray(8)))
    reader.close()
