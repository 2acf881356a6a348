"""A checkpoint folder of pickles -> one of safetensors: weights converted, small files copied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from nf4_pipeline.checkpoint.atomic import remove_leftovers, write_bytes, write_json
from nf4_pipeline.checkpoint.digest import FileDigest, digest_file
from nf4_pipeline.checkpoint.files import PICKLE_FILE
from nf4_pipeline.checkpoint.plain_file import read_plain
from nf4_pipeline.checkpoint.untrusted import size_limit
from nf4_pipeline.checkpoint.weight_files import INDEX_FILE
from nf4_pipeline.documents import Document, key, optional
from nf4_pipeline.errors import ResourceError, SourceError, UsageError
from nf4_pipeline.pickles import scan
from nf4_pipeline.pickles.scan import BARE, ScanRequest
from nf4_pipeline.processes.messages import Limits
from nf4_pipeline.processes.parent_side import ChildFailed, run
from nf4_pipeline.processes.worker import Worker
from nf4_pipeline.progress import Reporter
from nf4_pipeline.resource_usage import free_space

CODE_VERSION: Final = 1
NOTE_FILE: Final = "conversion.json"
_LARGEST_NOTE: Final = 64 * 2**20


@dataclass(frozen=True)
class ConvertRequest(Document):
    """A pickle, and the safetensors file that its tensors shall go to."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Converted(Document):
    """A safetensors file that was made.

    Attributes:
        digest: of the file.
        tensors: name -> bytes of each tensor.
        peak_memory_bytes: that the process took.
    """

    digest: FileDigest
    tensors: Mapping[str, int]
    peak_memory_bytes: int


WORKER: Final[Worker[ConvertRequest, Converted]] = Worker(
    "nf4_pipeline.pickles.worker", Converted, environment=BARE
)


@dataclass(frozen=True)
class _Origin(Document):
    """What a conversion depends on."""

    code: int
    files: Mapping[str, FileDigest]


@dataclass(frozen=True)
class _Note(Document):
    """conversion.json: what a folder was made from, and what was made; None while it is made."""

    origin: _Origin = field(metadata=key("from"))
    made: Mapping[str, FileDigest] | None = optional()


def convert(
    source: Path, files: Mapping[str, FileDigest], target: Path, reporter: Reporter
) -> dict[str, FileDigest]:
    """Makes `target` a checkpoint folder with the same tensors; what is there already is kept.

    Args:
        source: the folder with the pickles.
        files: digest of each file of it that is taken.
        target: a folder of its own; made if it does not exist.
        reporter: told how far it is, in bytes of the pickles.

    Returns:
        The digest of each file of the new folder.

    Raises:
        SourceError: a pickle would do more than rebuild tensors (it was not run), holds something
            else than tensors by name, has tensors that are more than its bytes, or the process
            that reads or converts it died.
        ResourceError: there is no room for the weights as safetensors.
        UsageError: `target` holds files that no conversion wrote.
    """
    pickles = sorted(name for name in files if PICKLE_FILE.fullmatch(name))
    small = {name: digest for name, digest in files.items() if not _is_replaced(name)}
    origin = _Origin(CODE_VERSION, dict(sorted(files.items())))
    if done := _read_earlier(target, origin):
        return {**done, **small}
    # All of them, before anything is written.
    sizes = {name: _scan(source / name) for name in pickles}
    _check_disk(target, sum(sizes.values()))
    _clear(target)
    write_json(target / NOTE_FILE, _Note(origin).to_json())
    digests: dict[str, FileDigest] = {}
    weight_map: dict[str, str] = {}
    total = 0
    with reporter.task("convert", sum(files[name].size for name in pickles)) as task:
        for name in pickles:
            output = _safetensors_name(name)
            converted = _run(source / name, target / output)
            digests[output] = converted.digest
            weight_map |= dict.fromkeys(converted.tensors, output)
            total += sum(converted.tensors.values())
            task.advance(files[name].size)
    if len(pickles) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(target / INDEX_FILE, index)
        digests[INDEX_FILE] = digest_file(target / INDEX_FILE)
    for name in small:
        write_bytes(target / name, read_plain(source / name, size_limit(name)))
    write_json(target / NOTE_FILE, _Note(origin, dict(sorted(digests.items()))).to_json())
    return {**digests, **small}


def _is_replaced(name: str) -> bool:
    return PICKLE_FILE.fullmatch(name) is not None or name.endswith(".bin.index.json")


def _safetensors_name(name: str) -> str:
    """`pytorch_model-00001-of-00002.bin` -> `model-00001-of-00002.safetensors`."""
    return name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"


def _read_earlier(target: Path, origin: _Origin) -> Mapping[str, FileDigest] | None:
    """The files of an earlier conversion of the same pickles, if they are still what it wrote."""
    try:
        note = _Note.from_json(json.loads(read_plain(target / NOTE_FILE, _LARGEST_NOTE)))
        if note.origin != origin or note.made is None:
            return None
        intact = all(digest_file(target / name) == d for name, d in note.made.items())
        return note.made if intact else None
    except (OSError, ValueError, RecursionError):
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


def _scan(source: Path) -> int:
    """The bytes of the tensors of a pickle that only rebuilds tensors."""
    try:
        return sum(run(scan.WORKER, ScanRequest(source)).tensors.values())
    except ChildFailed as failure:
        raise SourceError(
            f"{source} cannot be followed: the process that reads its program ended with status "
            f"{failure.status} ({failure.cause}); no real one takes a minute or 2 GB. Take a "
            "checkpoint in safetensors, from somebody whom you trust."
        ) from failure


def _check_disk(target: Path, needed: int) -> None:
    free = free_space(target)
    if needed > free:
        raise ResourceError(
            f"{target}: the weights take {needed:,} bytes as safetensors, and {free:,} are free. "
            "Make room, or name another --build-dir."
        )


def _run(source: Path, target: Path) -> Converted:
    # A turned tensor is copied whole; the mapped file counts, too.
    size = source.stat().st_size
    limits = Limits(processor_seconds=300 + size // 10**7, data_bytes=4 * 2**30 + 2 * size)
    try:
        return run(replace(WORKER, limits=limits), ConvertRequest(source, target))
    except ChildFailed as failure:
        raise SourceError(
            f"The process that converts {source} ended with status {failure.status}: "
            f"{failure.cause}. See that there is room for the safetensors, then run this again."
        ) from failure
