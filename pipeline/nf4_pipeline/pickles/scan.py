"""What a pickle would do, without doing it: which tensors it would rebuild, and nothing else.

This is a worker's module, too: a program may be made to take long, or much memory.
"""

from __future__ import annotations

import os
import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from nf4_pipeline.checkpoint.plain_file import open_plain
from nf4_pipeline.documents import Document
from nf4_pipeline.errors import SourceError
from nf4_pipeline.pickles.sizes import tensor_sizes
from nf4_pipeline.processes.messages import Limits
from nf4_pipeline.processes.worker import Environment, Worker
from nf4_pipeline.progress import Reporter

# What a child needs to run; above all no token.
BARE: Final = Environment(
    keep=frozenset({"PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH"}),
    add={"CUDA_VISIBLE_DEVICES": ""},
)

ALLOWED_GLOBALS: Final = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_tensor_v2",
        "torch BFloat16Storage",
        "torch BoolStorage",
        "torch ByteStorage",
        "torch CharStorage",
        "torch DoubleStorage",
        "torch FloatStorage",
        "torch HalfStorage",
        "torch IntStorage",
        "torch LongStorage",
        "torch ShortStorage",
    }
)
"""All that a state dict of plain tensors needs."""

# What torch.save writes, and no more. Left out are the ways to a class or function that is not
# named in one piece (STACK_GLOBAL, INST, OBJ, NEWOBJ, EXT1 …).
_ALLOWED_OPCODES: Final = frozenset(
    """PROTO MARK STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
    EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS
    BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL BINPERSID REDUCE BUILD""".split()
)

_MAX_PROGRAM: Final = 16 * 2**20  # bytes, of some 80,000 tensors; their own are not part of it


@dataclass(frozen=True)
class ScanRequest(Document):
    """A pickle."""

    source: Path


@dataclass(frozen=True)
class Scanned(Document):
    """What it would rebuild: name -> bytes of each tensor."""

    tensors: Mapping[str, int]


WORKER: Final[Worker[ScanRequest, Scanned]] = Worker(
    "nf4_pipeline.pickles.scan",
    Scanned,
    limits=Limits(processor_seconds=60, data_bytes=2 * 2**30),
    environment=BARE,
)


def run(request: ScanRequest, reporter: Reporter) -> Scanned:
    """Scans one file; arguments and errors are those of `scan`."""
    return Scanned(scan(request.source))


def scan(path: Path) -> dict[str, int]:
    """Lets a file pass that `torch.save` wrote and whose pickle only rebuilds tensors.

    Returns:
        The bytes of each tensor, by name.

    Raises:
        SourceError: the file is no archive of torch.save, or its pickle names or does anything
            else, or its tensors do not fit the bytes that are there; the text says what, and
            nothing was run.
    """
    try:
        program, storages = _contents(path)
        forbidden = _first_forbidden(program)
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError, IndexError) as error:
        raise _refusal(path, f"cannot be read as what torch.save writes ({error})") from error
    if forbidden:
        raise _refusal(path, f"does more than rebuild tensors: {forbidden}")
    try:
        return tensor_sizes(program, storages)
    except ValueError as error:
        raise _refusal(path, f"is not what torch.save writes of a state dict: {error}") from error


def _contents(path: Path) -> tuple[bytes, dict[str, int]]:
    """The one pickle in the archive, and the bytes of each storage beside it."""
    with open_plain(path) as file, _archive(file) as archive:
        size = os.fstat(file.fileno()).st_size
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        # Two readers may disagree on which of two equal names is meant.
        if len(set(names)) != len(names):
            raise ValueError("it has two entries of one name")
        programs = [e for e in entries if e.filename.endswith(".pkl")]
        if [entry.filename.rpartition("/")[2] for entry in programs] != ["data.pkl"]:
            raise ValueError("it does not hold exactly one data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")
        if any(entry.compress_size != entry.file_size for entry in entries):
            raise ValueError("it gives an entry two sizes")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its entries overlap")
        if programs[0].file_size > _MAX_PROGRAM:
            raise ValueError(f"its data.pkl is larger than {_MAX_PROGRAM:,} bytes")
        data = programs[0].filename.removesuffix("data.pkl") + "data/"
        return archive.read(programs[0]), {
            entry.filename.removeprefix(data): entry.file_size
            for entry in entries
            if entry.filename.startswith(data)
        }


def _archive(file: BinaryIO) -> zipfile.ZipFile:
    if file.read(4) != b"PK\x03\x04":
        raise ValueError("it is no zip archive; torch before 1.6 wrote bare pickles")
    return zipfile.ZipFile(file)


def _first_forbidden(program: bytes) -> str | None:
    end = 0
    for opcode, argument, position in pickletools.genops(program):
        end = (position or 0) + 1
        if opcode.name not in _ALLOWED_OPCODES:
            return f"opcode {opcode.name} at byte {position}"
        if opcode.name == "GLOBAL" and argument not in ALLOWED_GLOBALS:
            return f"it names {str(argument).replace(' ', '.')[:120]} at byte {position}"
    return None if end == len(program) else f"{len(program) - end} bytes follow its end"


def _refusal(path: Path, what: str) -> SourceError:
    return SourceError(
        f"{path} {what}. It was not opened. Take a checkpoint in safetensors, from somebody whom "
        "you trust."
    )
