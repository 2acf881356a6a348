"""The artifact against what its source makes; the first difference, down to tensor and byte."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nf4_pipeline.calibration.calibration_facts import CALIBRATION_FILE
from nf4_pipeline.checkpoint.digest import FileDigest, digest_file, digest_tensors
from nf4_pipeline.checkpoint.layout import FileLayout, StoredTensor
from nf4_pipeline.checkpoint.plain_file import read_beginning
from nf4_pipeline.checkpoint.sink import WrittenFile
from nf4_pipeline.documents import Document
from nf4_pipeline.engine.scheduler import Output
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.reproduce.derive import Derived

_CHUNK: Final = 4 * 2**20


@dataclass(frozen=True)
class Difference(Document):
    """A file that is not what the source makes.

    Attributes:
        file: its name in the artifact.
        what: in words.
        tensor: the first stored tensor that differs, where the file holds tensors.
        offset: of the first differing byte in the file, where there is a file to compare with.
    """

    file: str
    what: str
    tensor: str | None = None
    offset: int | None = None


def compare_files(
    artifact: Path,
    listed: Mapping[str, FileDigest],
    derived: Derived,
    small: Mapping[str, bytes],
    reporter: Reporter,
) -> list[Difference]:
    """Holds every file of an artifact against what it must be.

    Args:
        artifact: its folder; if it holds the manifest alone (beside the tokens of a calibrated
            one), that is held against what is made.
        listed: size and sha256 of each file, as the manifest has them.
        derived: the weight files.
        small: the other files.
        reporter: told how far it is.

    Returns:
        The differences, by file; only the first one, and that of the first weight file, say which
        byte.
    """
    expected = {name: written.digest for name, written in derived.written.items()}
    expected |= {name: FileDigest.of(content) for name, content in small.items()}
    # A manifest without the files that are made can be checked, too: its hashes are those of what
    # was published.
    made = listed.keys() - {CALIBRATION_FILE}
    manifest_alone = not any((artifact / name).exists() for name in made)
    differences: list[Difference] = []
    with reporter.task("check artifact", sum(digest.size for digest in expected.values())) as task:
        for name in sorted({*expected, *listed}):
            path = artifact / name
            if name not in expected:
                differences.append(Difference(name, "the source does not make it"))
            elif manifest_alone and name in listed:
                if listed[name] != expected[name]:
                    what = _sizes_or_hashes(listed[name], expected[name])
                    differences.append(Difference(name, what))
            elif not path.is_file():
                differences.append(Difference(name, "is missing"))
            elif (digest := digest_file(path, task)) != expected[name]:
                differences.append(Difference(name, _sizes_or_hashes(digest, expected[name])))
            elif name in listed and listed[name] != digest:
                differences.append(
                    Difference(name, f"is right, but the manifest lists {listed[name].sha256}")
                )
    for name in sorted(path.name for path in artifact.glob("*.safetensors")):
        if name not in expected and name not in listed:
            differences.append(Difference(name, "the source does not make it"))
    weights = next((n for n, d in enumerate(differences) if d.file in derived.outputs), 0)
    for number in {0, weights} if differences else ():
        found = differences[number]
        if (artifact / found.file).is_file() and found.file in expected:
            differences[number] = _locate(artifact, found, derived, small)
    return differences


def _sizes_or_hashes(actual: FileDigest, expected: FileDigest) -> str:
    if actual.size != expected.size:
        return f"has {actual.size:,} bytes, expected {expected.size:,}"
    return f"has sha256 {actual.sha256}, expected {expected.sha256}"


def _locate(
    artifact: Path,
    difference: Difference,
    derived: Derived,
    small: Mapping[str, bytes],
) -> Difference:
    """Says which byte of a file is the first that differs, and in which tensor."""
    name, path = difference.file, artifact / difference.file
    if name in small:
        offset = _first_difference(read_beginning(path, len(small[name]) + 1), small[name])
        return Difference(name, difference.what, offset=offset)
    output = derived.outputs[name]
    layout = output.layout
    offset = _first_difference(read_beginning(path, layout.data_start), layout.header())
    if offset is not None:
        return Difference(name, difference.what, "(header)", offset)
    if path.stat().st_size < layout.nbytes:
        return difference
    hashes = digest_tensors(path, layout.tensors)[1]
    right = derived.written[name].sha256
    wrong = [tensor.name for tensor in layout.tensors if hashes[tensor.name] != right[tensor.name]]
    if not wrong:  # bytes after the last tensor, or only the manifest differs
        offset = layout.nbytes if path.stat().st_size > layout.nbytes else None
        return Difference(name, difference.what, offset=offset)
    owner = next(t for t in output.tensors if wrong[0] in {part.name for part in t.stored})
    sink = ComparingSink(path, layout, wrong[0])
    derived.run.make(
        "derive",
        [Output(name, (owner,), layout)],
        lambda _: comparing(sink),
        lambda *_: None,
        SILENT,
    )
    return Difference(name, difference.what, wrong[0], sink.first)


def _first_difference(actual: bytes, expected: bytes) -> int | None:
    """The first position at which two texts differ, or None if they are equal."""
    if actual == expected:
        return None
    length = min(len(actual), len(expected))
    pairs = np.frombuffer(actual, np.uint8, length) != np.frombuffer(expected, np.uint8, length)
    return int(pairs.argmax()) if pairs.any() else length


class ComparingSink:
    """Holds one tensor, as it is made, against the bytes of a file.

    Attributes:
        first: the first differing byte in the file so far.
    """

    def __init__(self, path: Path, layout: FileLayout, tensor: str) -> None:
        self.first: int | None = None
        self._descriptor = os.open(path, os.O_RDONLY)
        self._layout = layout
        self._tensor = tensor
        self._offset = next(t.offset for t in layout.tensors if t.name == tensor)
        self._asked = False

    def write(self, name: str, start: int, data: NDArray[Any] | bytes) -> None:
        if name != self._tensor:
            return
        expected = bytes(data) if isinstance(data, bytes) else data.tobytes()
        offset = self._offset + start
        position = _first_difference(os.pread(self._descriptor, len(expected), offset), expected)
        if position is not None and (self.first is None or offset + position < self.first):
            self.first = offset + position

    def wants(self, tensors: Sequence[StoredTensor]) -> bool:
        asked, self._asked = self._asked, True
        return not asked

    def finish(self) -> WrittenFile:
        return WrittenFile(FileDigest(0, ""), self._layout.tensors, {})

    def close(self) -> None:
        os.close(self._descriptor)


@contextmanager
def comparing(sink: ComparingSink) -> Iterator[ComparingSink]:
    """A sink that compares, for whoever opens sinks in turn; its file is closed in the end."""
    try:
        yield sink
    finally:
        sink.close()
