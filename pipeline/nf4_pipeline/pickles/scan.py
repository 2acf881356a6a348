"""What a pickle would do, without doing it."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Final

from nf4_pipeline.errors import SourceError

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

_MAX_PROGRAM: Final = 64 * 2**20  # bytes; the tensors' bytes are not part of it


def scan(path: Path) -> None:
    """Lets a file pass that `torch.save` wrote and whose pickle only rebuilds tensors.

    Raises:
        SourceError: the file is no archive of torch.save, or its pickle names or does anything
            else; the text says what, and nothing was run.
    """
    try:
        program = _program(path)
        forbidden = _first_forbidden(program)
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError, IndexError) as error:
        raise _refusal(path, f"cannot be read as what torch.save writes ({error})") from error
    if forbidden:
        raise _refusal(path, f"does more than rebuild tensors: {forbidden}")


def _program(path: Path) -> bytes:
    """The one pickle in the archive."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise ValueError("it is no zip archive; torch before 1.6 wrote bare pickles")
    with zipfile.ZipFile(path) as archive:
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
        if programs[0].file_size > _MAX_PROGRAM:
            raise ValueError(f"its data.pkl is larger than {_MAX_PROGRAM:,} bytes")
        return archive.read(programs[0])


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
