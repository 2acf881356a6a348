"""The header parser: what the safetensors library writes is read; every kind of damage is named."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from nf4_pipeline.checkpoint.safetensors_header import (
    DTYPE_BYTES,
    MAX_HEADER_BYTES,
    HeaderTensor,
    header_bytes,
    read_header,
)
from nf4_pipeline.errors import CheckpointError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def write(path: Path, header: bytes | dict[str, Any], data: bytes = b"") -> Path:
    """Writes a file with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", TORCH)
def test_every_dtype_that_the_library_writes(tmp_path: Path, dtype: str) -> None:
    tensor = torch.zeros(3, 5).to(TORCH[dtype])
    save_file({"a.b": tensor}, tmp_path / "m.safetensors")
    (found,) = read_header(tmp_path / "m.safetensors")
    assert (found.name, found.dtype, found.shape) == ("a.b", dtype, (3, 5))
    assert found.nbytes == 15 * DTYPE_BYTES[dtype] == tensor.nbytes
    assert found.offset + found.nbytes == (tmp_path / "m.safetensors").stat().st_size


def test_places_are_where_the_bytes_are(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {f"t{i}": torch.arange(7 * i, dtype=torch.float32) + i for i in range(5)}
    tensors["é ∑ name"] = torch.tensor(2.5)
    save_file(tensors, path, metadata={"format": "pt", "other": "x"})
    found = read_header(path)
    content = path.read_bytes()
    assert {tensor.name for tensor in found} == set(tensors)
    for tensor in found:
        expected = tensors[tensor.name]
        assert tensor.shape == tuple(expected.shape)
        assert content[tensor.offset :][: tensor.nbytes] == expected.numpy().tobytes()
    assert [t.offset for t in found] == sorted(t.offset for t in found)


def test_a_file_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "m.safetensors")
    assert read_header(tmp_path / "m.safetensors") == ()


def test_empty_tensors_may_share_a_place(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(0, 4), "b": torch.ones(2), "c": torch.zeros(0)}, path)
    assert {t.name: t.nbytes for t in read_header(path)} == {"a": 0, "b": 8, "c": 0}


MALFORMED: dict[str, tuple[bytes | dict[str, Any], bytes, str]] = {
    "no brace": (b"[1, 2]", b"", "does not start with '{'"),
    "empty text": (b"  ", b"", "does not start with '{'"),
    "not JSON": (b'{"a": ', b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff\xfe": 1}', b"", "not valid JSON"),
    "text after the object": (b"{} {}", b"", "not valid JSON"),
    "deep nesting": (b'{"a": ' + b"[" * 100_000, b"", "not valid JSON"),
    "a name twice": (
        (
            b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
            b' "a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}'
        ),
        b"xy",
        "the key 'a' stands in it twice",
    ),
    "metadata a list": ({"__metadata__": [1]}, b"", "__metadata__ entry"),
    "metadata with a number": ({"__metadata__": {"a": 1}}, b"", "__metadata__ entry"),
    "empty name": ({"": entry()}, bytes(8), "impossible name ''"),
    "long name": ({"n" * 5000: entry()}, bytes(8), "impossible name 'nnnn"),
    "name with a line break": ({"a\nb": entry()}, bytes(8), "impossible name"),
    "entry a list": ({"a": [1]}, b"", "something else than dtype, shape and data_offsets"),
    "entry without a shape": (
        {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
        bytes(8),
        "'a' by something else",
    ),
    "entry with an extra key": (
        {"a": {**entry(), "stride": [1]}},
        bytes(8),
        "'a' by something else",
    ),
    "unknown dtype": ({"a": entry("F31")}, bytes(8), "unknown dtype 'F31'"),
    "dtype a number": ({"a": entry(32)}, bytes(8), "unknown dtype 32"),
    "dtype a list": ({"a": entry(["F32"])}, bytes(8), "unknown dtype"),
    "negative shape": ({"a": entry(shape=[-2])}, bytes(8), r"impossible shape \[-2\]"),
    "fractional shape": ({"a": entry(shape=[2.0])}, bytes(8), "impossible shape"),
    "boolean shape": ({"a": entry("U8", [True], [0, 1])}, bytes(1), "impossible shape"),
    "shape a text": ({"a": entry(shape="2")}, bytes(8), "impossible shape 2"),
    "shape of 40 dimensions": ({"a": entry("U8", [1] * 40, [0, 1])}, b"x", "impossible shape"),
    "astronomic shape": ({"a": entry(shape=[2**63])}, bytes(8), "impossible shape"),
    "shape whose product overflows": (
        {"a": entry("U8", [2**32, 2**32], [0, 0])},
        b"",
        r"0 bytes; shape \(4294967296, 4294967296\)",
    ),
    "one offset": ({"a": entry(offsets=[8])}, bytes(8), r"impossible data_offsets \[8\]"),
    "negative offset": ({"a": entry(offsets=[-8, 0])}, bytes(8), "impossible data_offsets"),
    "offsets swapped": ({"a": entry(offsets=[8, 0])}, bytes(8), "-8 bytes; shape"),
    "wrong length": ({"a": entry(offsets=[0, 4])}, bytes(4), "4 bytes; shape .* needs 8"),
    "hole": (
        {"a": entry("U8", [1], [0, 1]), "b": entry("U8", [1], [2, 3])},
        b"xyz",
        "leaves a hole before 'b'",
    ),
    "hole at the start": ({"a": entry("U8", [1], [1, 2])}, b"xy", "leaves a hole before 'a'"),
    "overlap": (
        {"a": entry("U8", [2], [0, 2]), "b": entry("U8", [2], [1, 3])},
        b"xyz",
        "overlaps at 'b'",
    ),
    "same bytes twice": (
        {"a": entry("U8", [2], [0, 2]), "b": entry("U8", [2], [0, 2])},
        b"xy",
        "overlaps at 'b'",
    ),
    "data too short": ({"a": entry()}, bytes(7), "is truncated: its tensors end at"),
    "data too long": ({"a": entry()}, bytes(9), "has 1 bytes that belong to no tensor"),
    "data without tensors": ({}, b"x", "has 1 bytes that belong to no tensor"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_by_name_and_cause(tmp_path: Path, case: str) -> None:
    header, data, message = MALFORMED[case]
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "again" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is 0 bytes long, too short"),
        (b"\x02\x00\x00\x00", "is 4 bytes long, too short"),
        (bytes(8), "is 8 bytes long, too short"),
        ((200).to_bytes(8, "little") + b"{}", "is truncated: its header needs 208 bytes"),
        (
            (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
            f"claims a header of {MAX_HEADER_BYTES + 1:,} bytes",
        ),
        (b"\xff" * 8 + b"{}", "claims a header of 18,446,744,073,709,551,615 bytes"),
    ],
)
def test_lengths_that_cannot_be(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_a_file_that_is_not_there_or_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: it is a folder"):
        read_header(tmp_path)


def test_every_cut_of_a_good_file_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(10.0), "b": torch.ones(3, 3)}, whole)
    content = whole.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for size in range(len(content)):
        cut.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"truncated|too short"):
            read_header(cut)


@dataclass(frozen=True)
class Part:
    """A tensor to put into a header by hand."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def test_our_headers_are_read_by_the_library(tmp_path: Path) -> None:
    parts = [
        Part("a", "F32", (2,), torch.tensor([1.5, -2.0]).numpy().tobytes()),
        Part('quote " and é', "U8", (3, 1), b"\x01\x02\x03"),
    ]
    room, position, tensors = 512, 512, []
    for part in parts:
        tensors.append(HeaderTensor(part.name, part.dtype, part.shape, position, len(part.data)))
        position += len(part.data)
    path = tmp_path / "m.safetensors"
    path.write_bytes(header_bytes(tensors, room) + b"".join(part.data for part in parts))
    loaded = load_file(path)
    assert loaded["a"].tolist() == [1.5, -2.0]
    assert loaded['quote " and é'].tolist() == [[1], [2], [3]]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert read_header(path) == tuple(tensors)


def test_a_header_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not fit the 24 reserved"):
        header_bytes([HeaderTensor("a", "U8", (1,), 32, 1)], 32)


def test_what_we_refuse_the_library_mostly_refuses_too(tmp_path: Path) -> None:
    """Holes, overlaps, wrong lengths and cut files are errors of the format, not our taste."""
    for case in ("hole", "overlap", "wrong length", "data too short", "data too long", "no brace"):
        header, data, _ = MALFORMED[case]
        path = write(tmp_path / "bad.safetensors", header, data)
        with pytest.raises(SafetensorError):
            load_file(path)
