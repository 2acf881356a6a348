"""The safetensors header: 8 bytes of length, a JSON object, then the tensors' bytes.

Parsed strictly, since a checkpoint is not to be trusted: every byte of the data section must belong
to exactly one tensor, and every length must agree with its shape and dtype. The format's own
description: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

from nf4_pipeline.checkpoint.plain_file import open_plain, read_beginning
from nf4_pipeline.checkpoint.strict_json import parse_json
from nf4_pipeline.errors import CheckpointError

DTYPE_BYTES: Final[dict[str, int]] = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}

MAX_HEADER_BYTES: Final = 16 * 2**20  # some 100,000 tensors; the largest real shards have 5,000
MAX_HEADERS_BYTES: Final = 4 * MAX_HEADER_BYTES
"""Of all files of a model; the largest real ones have 100,000 tensors in 200 files."""
LENGTH_BYTES: Final = 8
"""In front of a header; they say how long it is."""
_MAX_RANK: Final = 16
_MAX_NAME: Final = 1024
_ESCAPE: Final = re.compile(r"^/|\\|(^|/)\.\.(/|$)")


@dataclass(frozen=True)
class HeaderTensor:
    """One tensor of a file.

    Attributes:
        name: as written in the header.
        dtype: safetensors name, such as "BF16".
        shape: row-major.
        offset: of its first byte in the file (not in the data section).
        nbytes: its length.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def header_length(start: bytes) -> int:
    """How long a header is by its own word; 0 if that cannot be.

    Args:
        start: the first bytes of the file.
    """
    length = int.from_bytes(start[:LENGTH_BYTES], "little") if len(start) >= LENGTH_BYTES else 0
    return length if length <= MAX_HEADER_BYTES else 0


def check_headers_bytes(folder: Path, files: Sequence[str]) -> None:
    """Refuses files whose headers together would fill the memory.

    Args:
        folder: where they are.
        files: their names.

    Raises:
        CheckpointError: the headers claim more than `MAX_HEADERS_BYTES` together, or a file cannot
            be read.
    """
    total = 0
    for file in files:
        try:
            total += header_length(read_beginning(folder / file, LENGTH_BYTES))
        except OSError as error:
            raise CheckpointError(f"{folder / file} cannot be read: {error.strerror}.") from error
        if total > MAX_HEADERS_BYTES:
            raise CheckpointError(
                f"{folder}: the headers of its {len(files):,} weight files claim more than "
                f"{MAX_HEADERS_BYTES:,} bytes together, which no real model needs. Take it from "
                "another source."
            )


def read_header(path: Path) -> tuple[HeaderTensor, ...]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: the file is missing, no plain file, truncated or malformed; the text names
            file and cause.
    """
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or size < 8 + 2:
                raise _bad(path, f"is {size} bytes long, too short for a safetensors file")
            if length > MAX_HEADER_BYTES:
                raise _bad(
                    path, f"claims a header of {length:,} bytes; the limit is {MAX_HEADER_BYTES:,}"
                )
            if 8 + length > size:
                raise _bad(
                    path, f"is truncated: its header needs {8 + length:,} bytes, it has {size:,}"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return _parse(path, raw, data_start=8 + length, file_size=size)


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}. Download or copy the file again.")


def _parse(path: Path, raw: bytes, *, data_start: int, file_size: int) -> tuple[HeaderTensor, ...]:
    if not raw.startswith(b"{"):
        raise _bad(path, "has a header that does not start with '{'")
    try:
        header = parse_json(raw)
    except ValueError as error:
        raise _bad(path, f"has a header that is not valid JSON ({error})") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "has a __metadata__ entry that is not a map of strings")
    tensors = [_entry(path, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_contiguous(path, tensors, data_start, file_size)
    return tuple(tensors)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry(path: Path, name: str, entry: object, data_start: int) -> HeaderTensor:
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise _bad(path, f"has a tensor with an impossible name {name[:80]!r}")
    if _ESCAPE.search(name):
        raise _bad(path, f"has a tensor whose name is a path out of a folder: {name[:80]!r}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"describes {name!r} by something else than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _bad(path, f"gives {name!r} the unknown dtype {repr(dtype)[:80]}")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(map(_is_count, shape)):
        raise _bad(path, f"gives {name!r} the impossible shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _bad(path, f"gives {name!r} the impossible data_offsets {str(offsets)[:80]}")
    begin, end = offsets
    expected = prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != expected:
        raise _bad(
            path,
            f"gives {name!r} {end - begin:,} bytes; shape {tuple(shape)} of {dtype} needs "
            f"{expected:,}",
        )
    return HeaderTensor(name, dtype, tuple(shape), data_start + begin, expected)


def _check_contiguous(
    path: Path, tensors: Sequence[HeaderTensor], data_start: int, file_size: int
) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            kind = "leaves a hole before" if tensor.offset > position else "overlaps at"
            raise _bad(path, f"{kind} {tensor.name!r} (byte {tensor.offset}, expected {position})")
        position += tensor.nbytes
    if position > file_size:
        raise _bad(path, f"is truncated: its tensors end at {position:,}, it has {file_size:,}")
    if position < file_size:
        raise _bad(path, f"has {file_size - position:,} bytes that belong to no tensor")


def header_bytes(tensors: Sequence[HeaderTensor], data_start: int) -> bytes:
    """The first `data_start` bytes of a file with these tensors; spaces fill what is left.

    The one metadata key is what transformers asks for; with more than one, the order of the keys
    written by the safetensors library differs from run to run.

    Args:
        tensors: with offsets in the file; or, with `data_start` 0, in the data section: then only
            the JSON text is returned, without length and filling.
        data_start: where the first tensor stands.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for tensor in tensors:
        begin = tensor.offset - data_start
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    if data_start == 0:
        return text
    room = data_start - 8
    if len(text) > room:
        raise ValueError(f"header of {len(text)} bytes does not fit the {room} reserved")
    return room.to_bytes(8, "little") + text.ljust(room)
