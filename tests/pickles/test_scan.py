"""Pickles that would run something: none does, neither in the scan nor in the process behind it."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from nf4_pipeline.errors import SourceError
from nf4_pipeline.pickles.convert import WORKER, ConvertRequest
from nf4_pipeline.pickles.scan import scan
from nf4_pipeline.processes.parent_side import run


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def saved(folder: Path) -> Path:
    """What torch.save writes for an honest state dict."""
    path = folder / "pytorch_model.bin"
    state = torch.nn.Linear(4, 3).state_dict()  # an OrderedDict with metadata
    state["half"] = torch.ones(2, dtype=torch.bfloat16)
    state["parameter"] = torch.nn.Parameter(torch.zeros(2))
    torch.save(state, path)
    return path


def with_program(path: Path, program: bytes, name: str = "data.pkl", again: bytes = b"") -> None:
    """Puts another pickle into the archive; with `again`, one more of the same name."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    root = next(iter(entries)).partition("/")[0]
    del entries[f"{root}/data.pkl"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/{name}", program)
        if again:
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr(f"{root}/{name}", again)
        for entry, data in entries.items():
            archive.writestr(entry, data)


def touching(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()"


def by_reduce(path: Path, canary: Path) -> None:
    with_program(path, pickle.dumps(Calls(os.system, f"touch {canary}"), 2))


def by_stack_global(path: Path, canary: Path) -> None:
    with_program(path, pickle.dumps(Calls(exec, touching(canary)), 4))


def by_popen(path: Path, canary: Path) -> None:
    with_program(path, pickle.dumps({"w": Calls(subprocess.Popen, ["touch", str(canary)])}, 2))


def by_inst(path: Path, canary: Path) -> None:
    with_program(path, b"(S'touch %s'\nios\nsystem\n." % str(canary).encode())


def by_obj(path: Path, canary: Path) -> None:
    with_program(path, b"(cos\nsystem\nS'touch %s'\no." % str(canary).encode())


def by_newobj(path: Path, canary: Path) -> None:
    argument = str(["touch", str(canary)]).encode()
    program = b"\x80\x02csubprocess\nPopen\n(cbuiltins\neval\n(V%s\ntRt\x81." % argument
    with_program(path, program)


def by_torch_itself(path: Path, canary: Path) -> None:
    """A function of torch that runs what it is given."""
    load = b"\x80\x02ctorch.utils.collect_env\nrun\n(V touch %s\ntR." % str(canary).encode()
    with_program(path, load)


def by_build(path: Path, canary: Path) -> None:
    """`BUILD` calls __setstate__ of whatever class was named before."""
    with_program(path, pickle.dumps({"w": Calls(eval, touching(canary))}, 0))


def by_a_second_program(path: Path, canary: Path) -> None:
    with_program(path, pickle.dumps({}, 2), again=pickle.dumps(Calls(exec, touching(canary)), 2))


def by_another_pickle(path: Path, canary: Path) -> None:
    """TorchScript archives have a second one."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/constants.pkl", pickle.dumps(Calls(exec, touching(canary)), 2))


def by_a_bare_pickle(path: Path, canary: Path) -> None:
    """As torch wrote before 1.6, and as `pickle.load` takes."""
    path.write_bytes(pickle.dumps(Calls(exec, touching(canary)), 2))


def by_a_tar(path: Path, canary: Path) -> None:
    """The format before that."""
    data = pickle.dumps(Calls(exec, touching(canary)), 2)
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))


def by_an_extension(path: Path, canary: Path) -> None:
    """Codes of copyreg stand for any class that is registered."""
    with_program(path, b"\x80\x02\x82" + struct.pack("B", 1) + b".")


def after_the_end(path: Path, canary: Path) -> None:
    with_program(path, pickle.dumps({}, 2) + pickle.dumps(Calls(exec, touching(canary)), 2))


MALICIOUS: list[Callable[[Path, Path], None]] = [
    by_reduce,
    by_stack_global,
    by_popen,
    by_inst,
    by_obj,
    by_newobj,
    by_torch_itself,
    by_build,
    by_a_second_program,
    by_another_pickle,
    by_a_bare_pickle,
    by_a_tar,
    by_an_extension,
    after_the_end,
]


def name_of(make: Callable[[Path, Path], None]) -> str:
    return make.__name__


@pytest.mark.parametrize("make", MALICIOUS, ids=name_of)
def test_the_scan_refuses_and_runs_nothing(
    make: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    path, canary = saved(tmp_path), tmp_path / "canary"
    make(path, canary)
    with pytest.raises(SourceError, match=r"It was not opened\.") as caught:
        scan(path)
    assert str(path) in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize("make", MALICIOUS[:10], ids=name_of)
def test_the_process_behind_the_scan_runs_nothing_either(
    make: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    path, canary = saved(tmp_path), tmp_path / "canary"
    make(path, canary)
    # What has no effect on the tensors may be passed over; nothing else is read.
    passed_over = make in (by_a_second_program, by_another_pickle)
    with suppress(SourceError) if passed_over else pytest.raises(SourceError, match="cannot be"):
        run(WORKER, ConvertRequest(path, tmp_path / "model.safetensors"))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (by_reduce, "it names (posix|os).system at byte 2"),
        (by_stack_global, "opcode FRAME|opcode SHORT_BINUNICODE|opcode STACK_GLOBAL"),
        (by_a_bare_pickle, "it is no zip archive"),
        (by_a_second_program, "two entries of one name"),
        (by_an_extension, "opcode EXT1"),
        (after_the_end, "bytes follow its end"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_it_says_what_it_found(
    make: Callable[[Path, Path], None], said: str, tmp_path: Path
) -> None:
    path = saved(tmp_path)
    make(path, tmp_path / "canary")
    with pytest.raises(SourceError, match=said):
        scan(path)


def test_what_torch_saves_passes(tmp_path: Path) -> None:
    scan(saved(tmp_path))


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)
    with pytest.raises(SourceError, match="it is compressed"):
        scan(path)


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(SourceError, match=r"cannot be read as what torch\.save writes"):
        scan(path)
