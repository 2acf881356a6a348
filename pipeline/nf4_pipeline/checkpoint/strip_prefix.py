"""A checkpoint whose tensors have a wrapper's prefix -> one without it, copied into a new folder.

Values, dtypes, shapes and the files' names stay; every reader of the new folder finds the names
that the model knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from nf4_pipeline.checkpoint.atomic import remove_leftovers, write_bytes, write_json
from nf4_pipeline.checkpoint.digest import FileDigest, digest_file
from nf4_pipeline.checkpoint.layout import StoredTensor, plan_layout
from nf4_pipeline.checkpoint.plain_file import open_plain, read_plain
from nf4_pipeline.checkpoint.safetensors_header import HeaderTensor
from nf4_pipeline.checkpoint.source import Checkpoint, open_checkpoint
from nf4_pipeline.checkpoint.untrusted import size_limit
from nf4_pipeline.checkpoint.writer import writing
from nf4_pipeline.documents import Document, key, optional
from nf4_pipeline.errors import CheckpointError, UsageError
from nf4_pipeline.progress import Reporter, Task

NOTE_FILE: Final = "conversion.json"
_CODE_VERSION: Final = 1
_CHUNK: Final = 8 * 2**20
_LARGEST_NOTE: Final = 64 * 2**20


@dataclass(frozen=True)
class Origin(Document):
    """What a copy was made from.

    Attributes:
        code: version of the code that made it.
        prefix: that names lost.
        files: digest of each file, by name.
    """

    code: int
    prefix: str
    files: dict[str, FileDigest]


@dataclass(frozen=True)
class Note(Document):
    """conversion.json of a copy.

    Attributes:
        origin: what it is made from.
        made: digest of each of its files, by name; None as long as it is being made.
    """

    origin: Origin = field(metadata=key("from"))
    made: dict[str, FileDigest] | None = optional()


def check_prefix(checkpoint: Checkpoint, prefix: str) -> None:
    """Refuses a prefix that cannot be meant.

    Args:
        checkpoint: its headers.
        prefix: with its dot.

    Raises:
        UsageError: no tensor has it.
        CheckpointError: two tensors would have the same name without it.
    """
    names = [tensor.name for tensor in checkpoint.tensors]
    if not any(name.startswith(prefix) for name in names):
        raise UsageError(
            f"--strip-prefix {prefix}: no tensor of {checkpoint.folder} begins with it; they are "
            f"called like {names[0]!r}."
        )
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(_stripped(name, prefix), name)
        if other != name:
            raise CheckpointError(
                f"--strip-prefix {prefix}: {name!r} and {other!r} of {checkpoint.folder} would "
                "have the same name without it; expected only one of them."
            )


def copy_without_prefix(
    source: Path,
    files: Mapping[str, FileDigest],
    prefix: str,
    target: Path,
    reporter: Reporter,
) -> dict[str, FileDigest]:
    """Makes `target` a checkpoint folder with the same tensors under shorter names.

    Args:
        source: the checkpoint; `check_prefix` passed.
        files: digest of each file of it that is taken.
        prefix: with its dot; tensors that do not have it keep their names.
        target: a folder of its own; made if it does not exist. What an earlier call left there for
            the same files is kept.
        reporter: told how far it is, in bytes of the tensors.

    Returns:
        The digest of each file of the new folder.

    Raises:
        UsageError: `target` is somebody else's folder.
    """
    origin = Origin(_CODE_VERSION, prefix, dict(sorted(files.items())))
    if done := _standing(target, origin):
        return done
    _clear(target)
    checkpoint = open_checkpoint(source)
    write_json(target / NOTE_FILE, Note(origin).to_json())
    made: dict[str, FileDigest] = {}
    with reporter.task("strip prefix", checkpoint.nbytes) as task:
        for file in checkpoint.files:
            tensors = [tensor.header for tensor in checkpoint.tensors if tensor.file == file]
            made[file] = _copy(checkpoint.path(file), tensors, prefix, target / file, task)
    for name in files:
        if name in checkpoint.files:
            continue
        if name == checkpoint.index:
            weight_map = {_stripped(t.name, prefix): t.file for t in checkpoint.tensors}
            index = {"metadata": {"total_size": checkpoint.nbytes}, "weight_map": weight_map}
            write_json(target / name, index)
        else:
            write_bytes(target / name, read_plain(source / name, size_limit(name)))
        made[name] = digest_file(target / name)
    made = dict(sorted(made.items()))
    write_json(target / NOTE_FILE, Note(origin, made).to_json())
    return made


def _stripped(name: str, prefix: str) -> str:
    return name.removeprefix(prefix)


def _copy(
    source: Path, tensors: list[HeaderTensor], prefix: str, target: Path, task: Task
) -> FileDigest:
    layout = plan_layout(
        StoredTensor(_stripped(t.name, prefix), t.dtype, t.shape, t.nbytes) for t in tensors
    )
    with open_plain(source) as file, writing(target, layout) as output:
        for tensor in tensors:
            for start in range(0, tensor.nbytes, _CHUNK):
                file.seek(tensor.offset + start)
                data = file.read(min(_CHUNK, tensor.nbytes - start))
                output.write(_stripped(tensor.name, prefix), start, data)
                task.advance(len(data))
        return output.finish().digest


def _standing(target: Path, origin: Origin) -> dict[str, FileDigest] | None:
    """The files of an earlier copy of the same files, if they are still what it wrote."""
    try:
        note = json.loads(read_plain(target / NOTE_FILE, _LARGEST_NOTE))
        made = {name: FileDigest(d["size"], d["sha256"]) for name, d in note["made"].items()}
        same = note["from"] == origin.to_json() and all(
            digest_file(target / n) == d for n, d in made.items()
        )
        return made if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _clear(target: Path) -> None:
    """Empties the folder of what an earlier conversion left, and of nothing else."""
    if target.exists() and any(target.iterdir()) and not (target / NOTE_FILE).is_file():
        raise UsageError(
            f"{target} is there already and is not part of a build. Name another --build-dir."
        )
    if target.exists():
        remove_leftovers(target)
        for path in target.rglob("*"):
            if path.is_symlink() or path.is_file():
                path.unlink()
    target.mkdir(parents=True, exist_ok=True)
