"""A checkpoint folder of pickles -> one of safetensors: weights converted, small files copied."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.checkpoint.atomic import remove_leftovers, write_bytes, write_json
from nf4_pipeline.checkpoint.digest import FileDigest, digest_file
from nf4_pipeline.checkpoint.files import PICKLE_FILE
from nf4_pipeline.checkpoint.weight_files import INDEX_FILE
from nf4_pipeline.errors import SourceError, UsageError
from nf4_pipeline.pickles.scan import scan
from nf4_pipeline.progress import Reporter

CODE_VERSION: Final = 1
NOTE_FILE: Final = "conversion.json"

# What a child needs to run; above all no token.
_ENVIRONMENT: Final = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "PYTHONPATH")


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
        SourceError: a pickle would do more than rebuild tensors, or holds none; it was not run.
        UsageError: `target` is somebody else's folder.
    """
    pickles = sorted(name for name in files if PICKLE_FILE.fullmatch(name))
    small = {name: digest for name, digest in files.items() if not _replaced(name)}
    origin = {
        "code": CODE_VERSION,
        "files": {name: digest.as_json() for name, digest in sorted(files.items())},
    }
    if done := _standing(target, origin):
        return {**done, **small}
    for name in pickles:  # all of them, before anything is written
        scan(source / name)
    _clear(target)
    write_json(target / NOTE_FILE, {"from": origin})
    digests: dict[str, FileDigest] = {}
    weight_map: dict[str, str] = {}
    total = 0
    with reporter.task("convert", sum(files[name].size for name in pickles)) as task:
        for name in pickles:
            output = _safetensors_name(name)
            answer = _run(source / name, target / output)
            digests[output] = FileDigest(answer["size"], answer["sha256"])
            weight_map |= dict.fromkeys(answer["tensors"], output)
            total += sum(answer["tensors"].values())
            task.advance(files[name].size)
    if len(pickles) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(target / INDEX_FILE, index)
        digests[INDEX_FILE] = digest_file(target / INDEX_FILE)
    for name in small:
        write_bytes(target / name, (source / name).read_bytes())
    made = {name: digest.as_json() for name, digest in sorted(digests.items())}
    write_json(target / NOTE_FILE, {"from": origin, "made": made})
    return {**digests, **small}


def _replaced(name: str) -> bool:
    return PICKLE_FILE.fullmatch(name) is not None or name.endswith(".bin.index.json")


def _safetensors_name(name: str) -> str:
    """`pytorch_model-00001-of-00002.bin` -> `model-00001-of-00002.safetensors`."""
    return name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"


def _standing(target: Path, origin: dict[str, Any]) -> dict[str, FileDigest] | None:
    """The files of an earlier conversion of the same pickles, if they are still what it wrote."""
    try:
        note = json.loads((target / NOTE_FILE).read_text("utf-8"))
        made = {name: FileDigest(d["size"], d["sha256"]) for name, d in note["made"].items()}
        same = note["from"] == origin and all(digest_file(target / n) == d for n, d in made.items())
        return made if same else None
    except (OSError, ValueError, KeyError, TypeError):
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


def _run(source: Path, target: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "nf4_pipeline.pickles.worker", str(source), str(target)],
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        tail = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SourceError(
            f"The process that converts {source} ended with status {done.returncode}: {tail}. "
            "See that there is room for the safetensors, then run this again."
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise SourceError(
            f"{source} cannot be converted: {answer['error']}. Expected tensors by name, as "
            "torch.save writes a state dict; take a checkpoint in safetensors."
        )
    return answer
