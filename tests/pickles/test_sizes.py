"""Pickles whose tensors are more than their bytes: none is converted, nothing is written."""

from __future__ import annotations

import io
import pickle
import pickletools
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from nf4_pipeline.checkpoint.digest import digest_file
from nf4_pipeline.errors import ResourceError, SourceError
from nf4_pipeline.pickles import scan as scanning
from nf4_pipeline.pickles.convert import convert
from nf4_pipeline.pickles.scan import scan
from nf4_pipeline.processes.messages import Limits
from nf4_pipeline.progress import SILENT

BYTES: Final = 40  # of the one storage: ten numbers in float32


class _Named:
    """Pickles as a name."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Call:
    def __init__(self, function: str, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments


class _Storage:
    def __init__(self, key: str = "0", items: int = 10, kind: str = "FloatStorage") -> None:
        self.pid = ("storage", _Named(f"torch {kind}"), key, "cpu", items)


def view(
    size: Any, stride: Any, offset: Any = 0, storage: Any = None, *, kind: str = "FloatStorage"
) -> _Call:
    """A tensor as torch.save describes it."""
    of = _Storage(kind=kind) if storage is None else storage
    none = _Call("collections OrderedDict")
    return _Call("torch._utils _rebuild_tensor_v2", of, offset, size, stride, False, none)


def program(value: Any) -> bytes:
    """A pickle in the opcodes of torch.save, with anything in it."""
    out = bytearray(b"\x80\x02")

    def put(item: Any) -> None:
        match item:
            case _Named(name=name):
                out.extend(b"c" + name.replace(" ", "\n").encode() + b"\n")
            case _Call(function=function, arguments=arguments):
                put(_Named(function))
                put(arguments)
                out.extend(b"R")
            case _Storage(pid=pid):
                put(pid)
                out.extend(b"Q")
            case tuple():
                out.extend(b"(")
                for part in item:
                    put(part)
                out.extend(b"t")
            case dict():
                out.extend(b"}(")
                for key, part in item.items():
                    put(key)
                    put(part)
                out.extend(b"u")
            case bool():
                out.extend(b"\x88" if item else b"\x89")
            case str():
                raw = item.encode()
                out.extend(b"X" + struct.pack("<I", len(raw)) + raw)
            case bytes():
                out.extend(item)
            case _:
                plain = pickle.dumps(item, protocol=2)
                out.extend(plain[2:-1])

    put(value)
    return bytes(out) + b"."


def archive(path: Path, content: bytes, storages: dict[str, bytes] | None = None) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", content)
        file.writestr("model/version", "3\n")
        for key, data in ({"0": bytes(BYTES)} if storages is None else storages).items():
            file.writestr(f"model/data/{key}", data)


def tensors(**values: Any) -> bytes:
    return program(values)


ODD: Final[dict[str, tuple[bytes, str]]] = {
    "a stride of 0": (tensors(a=view((2**29,), (0,))), "536,870,912 items out of a storage of 10"),
    "two strides of 0": (tensors(a=view((2**20, 2**20), (0, 0))), "out of a storage of 10"),
    "rows that overlap": (tensors(a=view((9, 2), (1, 1))), "18 items out of a storage of 10"),
    "a negative stride": (tensors(a=view((5,), (-1,))), "impossible sizes or strides"),
    "a negative size": (tensors(a=view((-5,), (1,))), "impossible sizes or strides"),
    "a size that is true": (tensors(a=view((True,), (1,))), "impossible sizes or strides"),
    "a huge size": (tensors(a=view((2**63,), (1,))), "impossible sizes or strides"),
    "sizes that overflow": (tensors(a=view((2**62, 2**62), (1, 1))), "reaches to item"),
    "a size with a fraction": (tensors(a=view((2.5,), (1,))), "impossible sizes or strides"),
    "a size that is a text": (tensors(a=view("ab", "cd")), "otherwise than torch.save does"),
    "beyond its storage": (tensors(a=view((10,), (1,), 1)), "to item 11 of a storage of 10"),
    "beyond it by stride": (tensors(a=view((3,), (5,))), "reaches to item 11"),
    "an offset far out": (tensors(a=view((1,), (1,), 2**40)), "reaches to item"),
    "strides that lack one": (tensors(a=view((2, 2), (1,))), "otherwise than torch.save does"),
    "17 dimensions": (tensors(a=view((1,) * 17, (1,) * 17)), "17 dimensions"),
    "a storage said larger": (
        tensors(a=view((20,), (1,), 0, _Storage(items=20))),
        "gives the storage '0' 80 bytes, and holds 40",
    ),
    "a storage said smaller": (
        tensors(a=view((2,), (1,), 0, _Storage(items=2))),
        "gives the storage '0' 8 bytes, and holds 40",
    ),
    "a storage of wider items": (
        tensors(a=view((10,), (1,), kind="DoubleStorage")),
        "gives the storage '0' 80 bytes",
    ),
    "a storage that is not there": (
        tensors(a=view((10,), (1,), 0, _Storage("1"))),
        "has no bytes of the storage '1'",
    ),
    "a storage that is a number": (tensors(a=view((1,), (1,), 0, 7)), "otherwise than torch.save"),
    "a storage out of the archive": (
        tensors(a=view((10,), (1,), 0, _Storage("../data.pkl"))),
        "has no bytes of the storage '../data.pkl'",
    ),
    "one storage under 100 names": (
        program({f"t{i}": view((10,), (1,)) for i in range(100)}),
        "4,000 bytes of the 40",
    ),
    "no tensors by name": (program(view((10,), (1,))), "it holds a tensor"),
    "a number": (program({"a": 7}), "'a' is no plain tensor"),
    "numbers for names": (program({7: view((10,), (1,))}), "'7' is no plain tensor"),
    "a storage for a tensor": (tensors(a=_Storage()), "'a' is no plain tensor"),
    "a class for a tensor": (tensors(a=_Named("torch FloatStorage")), "'a' is no plain tensor"),
    "a dictionary in it": (program({"a": {"b": view((10,), (1,))}}), "'a' is no plain tensor"),
    "a call of a storage": (tensors(a=_Call("torch FloatStorage", 10**12)), "its program fails"),
    "a call with too little": (tensors(a=_Call("torch._utils _rebuild_tensor_v2")), "fails"),
    "attributes of a tensor": (
        program({"a": b""})[:-2] + program(view((10,), (1,)))[2:-1]
        + program({"nbytes": 0})[2:-1] + b"bu.",
        "its program fails",
    ),
    "slots of a tensor": (
        program({"a": b""})[:-2] + program(view((10,), (1,)))[2:-1]
        + program((None, {"nbytes": 0}))[2:-1] + b"bu.",
        "its program fails",
    ),
    "a key that cannot be one": (program({"a": b""})[:-2] + b"]" + b"Nu.", "its program fails"),
    "an empty program": (b"\x80\x02.", "its program fails"),
    "memo of nothing": (b"\x80\x02h\x07.", "its program fails"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_no_tensor_is_more_than_its_bytes(case: str, tmp_path: Path) -> None:
    content, said = ODD[case]
    assert len(content) < 20_000
    list(pickletools.genops(content))
    path = tmp_path / "pytorch_model.bin"
    archive(path, content)
    with pytest.raises(SourceError) as caught:
        scan(path)
    assert said in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_the_case_that_was_seen_writes_nothing(tmp_path: Path) -> None:
    """1.7 KB that became 2.1 GB of memory and 3.8 GB on disk; as torch.save writes it."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1).expand(2**30)}, path)
    assert path.stat().st_size < 2_000
    with pytest.raises(SourceError, match="1,073,741,824 items out of a storage of 1"):
        convert(tmp_path, {path.name: digest_file(path)}, tmp_path / "converted", SILENT)
    assert not (tmp_path / "converted").exists()


def test_a_head_that_is_tied_passes(tmp_path: Path) -> None:
    weight = torch.arange(8.0).reshape(2, 4)
    state = OrderedDict(a=weight, b=weight, c=torch.nn.Parameter(weight), d=weight.t())
    torch.save(state, tmp_path / "model.bin")
    assert scan(tmp_path / "model.bin") == dict.fromkeys("abcd", 32)


def overlapping(path: Path) -> None:
    """Two entries of the directory that are the same bytes."""
    archive(path, tensors(a=view((10,), (1,))), {"0": bytes(BYTES), "1": bytes(BYTES)})
    raw = bytearray(path.read_bytes())
    ends = [i for i in range(len(raw)) if raw[i : i + 4] == b"PK\x01\x02"]
    for start in ends[1:]:  # each claims all of the file
        struct.pack_into("<II", raw, start + 20, len(raw) - 60, len(raw) - 60)
    path.write_bytes(bytes(raw))


def two_sizes(path: Path) -> None:
    archive(path, tensors(a=view((10,), (1,))))
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, raw.rindex(b"PK\x01\x02") + 24, 4000)
    path.write_bytes(bytes(raw))


def too_long(path: Path) -> None:
    archive(path, b"\x80\x02" + b"N0" * (9 * 2**20) + b".")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (overlapping, "entries overlap"),
        (two_sizes, "two sizes"),
        (too_long, "data.pkl is larger than"),
    ],
)
def test_archives_that_lie(make: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    make(tmp_path / "model.bin")
    with pytest.raises(SourceError, match=said):
        scan(tmp_path / "model.bin")


def test_a_program_that_takes_memory_ends_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pytorch_model.bin"
    archive(path, b"\x80\x02" + b"}" * (4 * 2**20) + b".")  # 300 MB of empty dictionaries
    small = replace(scanning.WORKER, limits=Limits(data_bytes=250 * 10**6))
    monkeypatch.setattr(scanning, "WORKER", small)
    with pytest.raises(SourceError, match=r"pytorch_model\.bin .*(MemoryError|ended with status)"):
        convert(tmp_path, {path.name: digest_file(path)}, tmp_path / "converted", SILENT)


def test_a_disk_without_room_is_known_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1000)}, path)
    full = type("Usage", (), {"free": 3999})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(ResourceError, match="take 4,000 bytes as safetensors, and 3,999 are free"):
        convert(tmp_path, {path.name: digest_file(path)}, tmp_path / "converted", SILENT)
    assert not (tmp_path / "converted").exists()


def test_the_programs_of_these_tests_are_what_torch_reads(tmp_path: Path) -> None:
    archive(tmp_path / "model.bin", tensors(a=view((2, 5), (5, 1))))
    assert scan(tmp_path / "model.bin") == {"a": BYTES}
    loaded = torch.load(io.BytesIO((tmp_path / "model.bin").read_bytes()), weights_only=True)
    assert loaded["a"].shape == (2, 5)
