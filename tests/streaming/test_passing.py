"""Files that pass by: every byte once, in its order, in little memory, whoever reads how fast."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nf4_pipeline.checkpoint.safetensors_header import HeaderTensor, read_header
from nf4_pipeline.errors import HubError
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.streaming import passing as module
from nf4_pipeline.streaming import stretches
from nf4_pipeline.streaming.passing import Passing
from nf4_pipeline.streaming.stretches import Fetch, PassedFile
from safetensors.numpy import save_file

from tests.support.told import Told

SHAPES = {"embed": (300, 20), **{f"h.{i}.{n}": (20, 9 + i) for i in range(4) for n in "abc"}}


class Remote:
    """A file on a Hub, and what was asked of it."""

    def __init__(self, path: Path) -> None:
        self.whole = path.read_bytes()
        self.headers = read_header(path)
        self.start = self.headers[0].offset
        self.asked: list[tuple[int, int]] = []
        self.wrong: set[int] = set()  # first bytes of stretches that come wrong
        self._lock = threading.Lock()

    @property
    def header(self) -> bytes:
        return self.whole[: self.start]

    def fetch(self, file: str, start: int, end: int) -> bytes:
        with self._lock:
            self.asked.append((start, end))
        data = self.whole[start:end]
        return bytes(len(data)) if start in self.wrong else data

    def passing(
        self,
        wanted: list[HeaderTensor],
        tensors: list[HeaderTensor] | None = None,
        header: bytes | None = None,
        fetch: Fetch | None = None,
        reporter: Reporter = SILENT,
    ) -> Passing:
        named = [t for t in self.headers if t.name == "embed"]
        return Passing.whole(
            "f",
            len(self.whole),
            self.header if header is None else header,
            list(self.headers) if tensors is None else tensors,
            spans(wanted),
            fetch or self.fetch,
            reporter,
            named,
        )

    def passed(self) -> PassedFile:
        with self.passing([]) as passing:
            return passing.finish()


def spans(tensors: list[HeaderTensor]) -> list[tuple[int, int]]:
    return [(t.offset, t.offset + t.nbytes) for t in tensors]


def read(passing: Passing, tensor: HeaderTensor, step: int = 700) -> bytes:
    found = np.empty(tensor.nbytes, np.uint8)
    for at in range(0, tensor.nbytes, step):
        passing.read(found[at : at + step], tensor.offset + at, tensor)
    return found.tobytes()


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """One file of 13 tensors, in stretches of 1,000 bytes, three of which are kept."""
    monkeypatch.setattr(stretches, "LARGEST", 1000)
    monkeypatch.setattr(module, "LARGEST", 1000)
    monkeypatch.setattr(module, "AHEAD", 3000)
    dice = np.random.default_rng(0)
    tensors = {name: dice.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return Remote(tmp_path / "model.safetensors")


@pytest.mark.parametrize("of", ["all", "none", "some", "the last"])
def test_what_is_wanted_is_read_and_all_is_hashed(of: str, remote: Remote) -> None:
    headers = list(remote.headers)
    wanted = {"all": headers, "none": [], "some": headers[1::3], "the last": headers[-1:]}[of]
    told = Told()
    with remote.passing(wanted, reporter=told) as passing:
        assert passing.begins_as_planned()
        for tensor in wanted:
            whole = remote.whole[tensor.offset : tensor.offset + tensor.nbytes]
            assert read(passing, tensor) == whole
        found = passing.finish()
        assert not passing._here
        assert passing._held == 0
    assert [task.total for task in told.tasks] == [len(remote.whole)]
    assert found.size == len(remote.whole)
    assert found.sha256 == hashlib.sha256(remote.whole).hexdigest()
    assert sorted(remote.asked) == remote.asked or len(remote.asked) == len(set(remote.asked))
    end = remote.start
    for stretch in found.stretches:
        assert stretch.start == end
        end = stretch.end
        part = remote.whole[stretch.start : stretch.end]
        assert hashlib.sha256(part).hexdigest() == stretch.sha256
    assert end == len(remote.whole)
    embed = next(t for t in headers if t.name == "embed")
    whole = remote.whole[embed.offset : embed.offset + embed.nbytes]
    assert found.tensors == {"embed": hashlib.sha256(whole).hexdigest()}


def test_little_is_held(remote: Remote) -> None:
    """However slowly it is read; and nothing comes beyond what a reader could need soon."""
    wanted = list(remote.headers)
    with remote.passing(wanted) as passing:
        passing.begins_as_planned()
        for tensor in wanted:
            time.sleep(0.002)
            assert passing._held <= 3000 + 1000
            read(passing, tensor)
        passing.finish()


def test_a_reader_that_wants_the_end_first_gets_it(remote: Remote) -> None:
    """As one who reads columns: all before it comes, more than is held otherwise."""
    wanted = list(remote.headers)
    with remote.passing(wanted) as passing:
        for tensor in reversed(wanted):
            whole = remote.whole[tensor.offset : tensor.offset + tensor.nbytes]
            assert read(passing, tensor) == whole
        assert passing.finish().sha256 == hashlib.sha256(remote.whole).hexdigest()


@pytest.mark.parametrize("seed", range(4))
def test_many_readers_at_once(seed: int, remote: Remote) -> None:
    """In any order that threads come to."""
    wanted = list(remote.headers)
    order, found = wanted.copy(), dict[str, bytes]()
    random.Random(seed).shuffle(order)
    with remote.passing(wanted) as passing:

        def one(tensor: HeaderTensor) -> None:
            found[tensor.name] = read(passing, tensor)

        threads = [threading.Thread(target=one, args=(tensor,)) for tensor in order]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        passing.finish()
    for tensor in wanted:
        assert found[tensor.name] == remote.whole[tensor.offset : tensor.offset + tensor.nbytes]


def test_tensors_that_count_in_another_file_pass_by_too(remote: Remote) -> None:
    """The file is hashed to its end, whatever of it is known to the model."""
    for left in (remote.headers[1:], remote.headers[:-1], remote.headers[3:7], ()):
        with remote.passing(list(left), tensors=list(left)) as passing:
            for tensor in left:
                read(passing, tensor)
            found = passing.finish()
        assert found.sha256 == hashlib.sha256(remote.whole).hexdigest()


def test_what_is_known_comes_alone_and_by_its_hash(remote: Remote) -> None:
    passed = remote.passed()
    wanted = [remote.headers[0], remote.headers[7]]
    remote.asked.clear()
    with Passing.known("f", passed, spans(wanted), remote.fetch, SILENT) as passing:
        assert passing.nbytes < len(remote.whole) / 1.1
        for tensor in wanted:
            whole = remote.whole[tensor.offset : tensor.offset + tensor.nbytes]
            assert read(passing, tensor) == whole
    assert len(remote.asked) == len(set(remote.asked))
    assert sum(end - start for start, end in remote.asked) == passing.nbytes


def test_other_bytes_than_before_are_refused(remote: Remote) -> None:
    passed = remote.passed()
    tensor = remote.headers[0]
    remote.wrong.add(passed.stretches[1].start)
    with (
        Passing.known("f", passed, spans([tensor]), remote.fetch, SILENT) as passing,
        pytest.raises(HubError, match="came wrong twice"),
    ):
        read(passing, tensor)


def test_another_header_than_planned(remote: Remote) -> None:
    changed = remote.header.replace(b"h.1.a", b"h.9.a")
    with remote.passing([], header=changed) as passing:
        assert not passing.begins_as_planned()
        assert passing.finish().sha256 == hashlib.sha256(remote.whole).hexdigest()


@pytest.mark.parametrize("at", [0, 1, 9])
def test_a_hub_that_fails_ends_readers_and_the_end(at: int, remote: Remote) -> None:
    def fetch(file: str, start: int, end: int) -> bytes:
        if len(remote.asked) >= at:
            raise HubError("planned")
        return remote.fetch(file, start, end)

    with remote.passing(list(remote.headers), fetch=fetch) as passing:
        with pytest.raises(HubError, match="planned"):
            [read(passing, tensor) for tensor in remote.headers]
        with pytest.raises(HubError, match="planned"):
            passing.finish()


def test_leaving_ends_what_is_on_its_way(remote: Remote) -> None:
    """Though nobody read anything of it."""
    passing: Any
    with remote.passing(list(remote.headers)) as passing:
        passing.begins_as_planned()
    assert not passing._thread.is_alive()
    assert len(remote.asked) < len(passing._spans)
