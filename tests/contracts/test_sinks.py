"""What holds for everything that takes the bytes of an output file (`checkpoint.sink.Sink`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from nf4_pipeline.checkpoint.layout import FileLayout, StoredTensor, plan_layout
from nf4_pipeline.checkpoint.sink import HashingSink, Sink, WrittenFile, hashing
from nf4_pipeline.checkpoint.writer import writing
from nf4_pipeline.reproduce.compare_files import ComparingSink, comparing

Part = tuple[str, int, bytes]
Opener = Callable[[Path, FileLayout], AbstractContextManager[Sink]]

CONTENT: Final = {f"t{i}": np.random.default_rng(i).bytes(1_500 + 37 * i) for i in range(9)} | {
    "empty": b""
}
STORED: Final = {n: StoredTensor(n, "U8", (len(d),), len(d)) for n, d in CONTENT.items()}
LAYOUT: Final = plan_layout(STORED.values())
STEP: Final = 700
PARTS: Final[list[Part]] = [
    (n, s, d[s : s + STEP]) for n, d in CONTENT.items() for s in range(0, len(d) or 1, STEP)
]


def _compare(path: Path, layout: FileLayout) -> AbstractContextManager[Sink]:
    """Beside a file that is right."""
    with writing(path, layout) as output:
        for part in PARTS:
            output.write(*part)
        output.finish()
    return comparing(ComparingSink(path, layout, "t3"))


OPENERS: Final[dict[str, Opener]] = {
    "a file": writing,
    "hashes alone": lambda _, layout: hashing(layout),
    "hashes alone, without room": lambda _, layout: nullcontext(HashingSink(layout, 0)),
    "a comparison": _compare,
}


def in_order(order: str) -> list[Part]:
    if order == "backwards":
        return PARTS[::-1]
    if order == "shuffled":
        return [PARTS[i] for i in np.random.default_rng(0).permutation(len(PARTS))]
    return PARTS


def fill(sink: Sink, parts: list[Part], threads: int = 1) -> WrittenFile:
    """As the engine does: tensors are made as long as the sink wants them."""
    for _ in range(len(parts) + 1):
        wanted = {name for name in STORED if sink.wants([STORED[name]])}
        if not wanted:
            return sink.finish()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda part: sink.write(*part), [p for p in parts if p[0] in wanted]))
    raise AssertionError("the sink wants tensors without end")


@pytest.fixture(params=OPENERS)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> AbstractContextManager[Sink]:
    return OPENERS[request.param](tmp_path / "m.safetensors", LAYOUT)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("order", ["in turn", "backwards", "shuffled"])
def test_parts_come_in_any_order_from_any_thread(
    opened: AbstractContextManager[Sink], order: str, threads: int
) -> None:
    with opened as sink:
        written = fill(sink, in_order(order), threads)
    assert written.tensors == LAYOUT.tensors
    if isinstance(sink, ComparingSink):
        assert sink.first is None
        return
    assert written.digest.size == LAYOUT.nbytes
    assert written.sha256 == {n: hashlib.sha256(d).hexdigest() for n, d in CONTENT.items()}


def test_nothing_is_wanted_in_the_end(opened: AbstractContextManager[Sink]) -> None:
    with opened as sink:
        assert sink.wants(list(STORED.values()))
        fill(sink, PARTS)
        assert not sink.wants(list(STORED.values()))
        assert not sink.wants([])


def test_arrays_are_taken_as_bytes_are(tmp_path: Path) -> None:
    arrays = [(n, s, np.frombuffer(d, np.uint8)) for n, s, d in PARTS]
    for name, opener in OPENERS.items():
        with opener(tmp_path / name, LAYOUT) as sink:
            while sink.wants(list(STORED.values())):
                for part in arrays:
                    if sink.wants([STORED[part[0]]]):
                        sink.write(*part)
            written = sink.finish()
        if not isinstance(sink, ComparingSink):
            assert written.sha256["t8"] == hashlib.sha256(CONTENT["t8"]).hexdigest()


def test_all_that_hash_agree_on_the_file(tmp_path: Path) -> None:
    digests = set()
    for name in ("a file", "hashes alone", "hashes alone, without room"):
        with OPENERS[name](tmp_path / name, LAYOUT) as sink:
            digests.add(fill(sink, in_order("shuffled")).digest)
    assert len(digests) == 1
