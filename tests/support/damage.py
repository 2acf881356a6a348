"""What can happen to an export, file by file, and what each command says of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.files import entries
from nf4_pipeline.checkpoint.safetensors_header import read_header
from nf4_pipeline.errors import PipelineError
from nf4_pipeline.hub import Target
from nf4_pipeline.job import run_build, run_stage, states
from nf4_pipeline.progress import SILENT
from nf4_pipeline.provenance.signing import SIGNATURE_FILE, check, sign
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.stages.download_request import DownloadRequest
from nf4_pipeline.stages.push import Push

from tests.support.jobs import CPU
from tests.support.notes import Notes
from tests.support.signed import make_keys
from tests.support.tamper import agree, shuffle_codes
from tests.support.tiny import copy_of, edit_json

UP: Final = "transformer.h.0.mlp.dense_h_to_4h.weight"
NORM: Final = "transformer.h.1.input_layernorm.weight"
DOCUMENTS: Final = ("verification.json", "report.html")
"""What verify writes: a damage to them is undone by the command that was asked to look."""

_REPO: Final = "me/artifact"

Damage = Callable[[Build, str], None]
"""Damages a file of a build's export, by its name."""


@dataclass(frozen=True)
class Signed:
    """A whole build that is signed.

    Attributes:
        root: of the build.
        model: that it was made from.
        recipe: by which.
        private, public: PEM files.
    """

    root: Path
    model: Path
    recipe: Recipe
    private: Path
    public: Path


def make_signed(exported: Path, model: Path, recipe: Recipe, folder: Path) -> Signed:
    """Verifies, attests and signs a build that lacks nothing else."""
    build = Build(copy_of(exported, folder / "build"))
    run_stage(build, "verify", recipe, CPU, SILENT)
    run_stage(build, "attest", recipe, CPU, SILENT, repo_id=_REPO)
    private, public = make_keys(folder, "key")
    sign(build.export, private)
    return Signed(build.root, model, recipe, private, public)


# --- damages ---


def put(path: Path, content: bytes) -> None:
    """Writes a file anew; others that shared its bytes keep theirs."""
    path.unlink()
    path.write_bytes(content)


def flip(path: Path, position: int, *, keep_time: bool = False) -> None:
    """Changes one bit, in place."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_in_tensor(tensor: str) -> Damage:
    def damage(build: Build, name: str) -> None:
        entry = next(t for t in read_header(build.export / name) if t.name == tensor)
        flip(build.export / name, entry.offset + entry.nbytes // 2)

    return damage


def flip_in_header(build: Build, name: str) -> None:
    flip(build.export / name, (build.export / name).read_bytes().index(b"__metadata__") + 3)


def flip_anywhere(build: Build, name: str) -> None:
    flip(build.export / name, (build.export / name).stat().st_size // 2)


def flip_and_keep_the_time(build: Build, name: str) -> None:
    path = build.export / name
    flip(path, path.stat().st_size // 2, keep_time=True)


def truncate(build: Build, name: str) -> None:
    put(build.export / name, (build.export / name).read_bytes()[:-7])


def append(build: Build, name: str) -> None:
    put(build.export / name, (build.export / name).read_bytes() + b"\n")


def empty(build: Build, name: str) -> None:
    put(build.export / name, b"")


def swap_tensors(build: Build, name: str) -> None:
    """Two tensors of one shape and dtype change places."""
    path = build.export / name
    seen: dict[object, tuple[int, int]] = {}
    content = bytearray(path.read_bytes())
    for tensor in read_header(path):
        key, span = (tensor.dtype, tensor.shape), (tensor.offset, tensor.offset + tensor.nbytes)
        start, end = seen.setdefault(key, span)
        one, other = bytes(content[start:end]), bytes(content[span[0] : span[1]])
        if one != other:
            content[start:end], content[span[0] : span[1]] = other, one
            break
    else:
        raise AssertionError("no two tensors of one shape differ")
    put(path, bytes(content))


def swap_files(build: Build, name: str) -> None:
    """A file and the next one of its kind change places."""
    kind = Path(name).suffix
    names = [other for other in sorted(entries(build.export)) if other.endswith(kind)]
    other = names[(names.index(name) + 1) % len(names)]
    one, two = ((build.export / file).read_bytes() for file in (name, other))
    assert one != two
    put(build.export / name, two)
    put(build.export / other, one)


def rewrite_manifest(build: Build, name: str) -> None:
    """Codes shuffled, and a manifest that agrees; what serialize recorded does not."""
    record = build.root / "records" / "serialize.json"
    before = record.read_bytes()
    shuffle_codes(UP)(build)
    agree(build)
    record.write_bytes(before)


def rewrite_manifest_and_record(build: Build, name: str) -> None:
    """Codes shuffled; manifest and record of serialize agree."""
    shuffle_codes(UP)(build)
    agree(build)


def forge_source(build: Build, name: str) -> None:
    """Another repo and commit in the manifest, and in the record of serialize."""
    source = json.loads((build.export / name).read_text())["source"]
    edit_json(build.export / name, source={**source, "repo": "some/other", "commit": "0" * 40})
    agree(build)


def change_tokenizer(build: Build, name: str) -> None:
    """Two tokens change their numbers; the file is as long as it was, and loads."""
    path = build.export / name
    value = json.loads(path.read_text("utf-8"))
    vocabulary = value["model"]["vocab"]
    first, second = list(vocabulary)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    put(path, json.dumps(value, indent=2, ensure_ascii=False).encode())


def change_config(build: Build, name: str) -> None:
    """A model that computes something else, of the same shapes."""
    edit_json(build.export / name, layer_norm_epsilon=0.1)


def put_older(build: Build, name: str) -> None:
    """What a run before this one may have left: whole and valid, and of another time."""
    path = build.export / name
    if name.endswith(".json"):
        value = json.loads(path.read_text())
        put(path, json.dumps({**value, "versions": {"nf4-pipeline": "0.0.1"}}, indent=2).encode())
    else:
        put(path, path.read_bytes().replace(b"the ", b"another ", 1))


def delete(build: Build, name: str) -> None:
    (build.export / name).unlink()


def add(build: Build, name: str) -> None:
    path = build.export / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"somebody else's")


def add_link(build: Build, name: str) -> None:
    (build.export / name).symlink_to("/etc/hostname")


def put_link(build: Build, name: str) -> None:
    """The same bytes, elsewhere."""
    path, elsewhere = build.export / name, build.root.parent / f"elsewhere-{Path(name).name}"
    shutil.copy(path, elsewhere)
    path.unlink()
    path.symlink_to(elsewhere)


SMALL: Final = (
    "config.json",
    "manifest.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
FIRST: Final = "model-00001-of-00002.safetensors"
WEIGHTS: Final = (FIRST, "model-00002-of-00002.safetensors")
ATTESTED: Final = ("bom.cdx.json", "provenance.json", "README.md")

DAMAGES: Final[dict[str, tuple[Damage, tuple[str, ...]]]] = {
    "a bit of codes flipped": (flip_in_tensor(UP), (FIRST,)),
    "a bit of scales flipped": (flip_in_tensor(f"{UP}.absmax"), (FIRST,)),
    "a bit of nested scales flipped": (flip_in_tensor(f"{UP}.nested_absmax"), (FIRST,)),
    "a bit of a norm flipped": (flip_in_tensor(NORM), ("",)),  # whichever file holds it
    "a bit of the header flipped": (flip_in_header, WEIGHTS),
    "a bit flipped": (flip_anywhere, (*WEIGHTS, *SMALL, *DOCUMENTS, *ATTESTED)),
    "a bit flipped, the time kept": (flip_and_keep_the_time, (*WEIGHTS, *SMALL, *DOCUMENTS)),
    "truncated": (truncate, (*WEIGHTS, *SMALL, *DOCUMENTS, *ATTESTED)),
    "bytes appended": (append, (*WEIGHTS, *SMALL, *DOCUMENTS, *ATTESTED)),
    "emptied": (empty, (*WEIGHTS, *SMALL, *DOCUMENTS, *ATTESTED)),
    "two tensors swapped": (swap_tensors, WEIGHTS),
    "two files swapped": (swap_files, (FIRST, "tokenizer.json", "verification.json")),
    "manifest rewritten": (rewrite_manifest, ("manifest.json",)),
    "manifest and record rewritten": (rewrite_manifest_and_record, ("manifest.json",)),
    "source in manifest and record forged": (forge_source, ("manifest.json",)),
    "tokenizer changed": (change_tokenizer, ("tokenizer.json",)),
    "config changed": (change_config, ("config.json",)),
    "an older one": (put_older, (*DOCUMENTS, "README.md")),
    "deleted": (delete, (*WEIGHTS, *SMALL, *DOCUMENTS, *ATTESTED)),
    "added": (add, ("notes.txt", "pytorch_model.bin", "model.safetensors", "extra/config.json")),
    "a link added": (add_link, ("LICENSE",)),
    "a link in its place": (put_link, (*WEIGHTS, *SMALL, *DOCUMENTS, *ATTESTED)),
}


def cases() -> Iterator[tuple[str, str]]:
    """Each damage and each file that it is done to."""
    for kind, (_, files) in DAMAGES.items():
        for name in files:
            yield kind, name


def damaged(signed: Signed, folder: Path, kind: str, name: str) -> tuple[Build, str]:
    """A damaged copy of a build, and the file that was damaged."""
    build = Build(copy_of(signed.root, folder))
    if not name:
        name = next(
            path.name
            for path in sorted(build.export.glob("*.safetensors"))
            if NORM in {tensor.name for tensor in read_header(path)}
        )
    DAMAGES[kind][0](build, name)
    return build, name


# --- what is said of it ---


def ask_verify(signed: Signed, build: Build, name: str) -> str:
    """`nf4 verify`: "fail", the kind of an error, or what was made anew; "ok" is wrong."""
    path, notes = build.export / name, Notes()
    before = None if path.is_symlink() or not path.is_file() else path.read_bytes()
    try:
        result = run_stage(build, "verify", signed.recipe, CPU, notes)
    except PipelineError as error:
        return type(error).__name__
    assert result.ran
    if result.record.facts.verdict != "pass":
        return "fail"
    said = any(f"export/{name} is not what" in note for note in notes.said)
    plain = path.is_file() and not path.is_symlink()
    anew = plain and path.read_bytes() != before
    return "made anew" if said and anew else "ok"


def ask_status(signed: Signed, build: Build, name: str) -> str:
    """`nf4 status`: the stages that are not done; "ok" is wrong."""
    found = states(build, signed.recipe, CPU)
    return ", ".join(stage for stage, state in found.items() if state.status != "done") or "ok"


def ask_push(signed: Signed, build: Build, name: str) -> str:
    """`nf4 push`: the kind of the error; "ok" is wrong."""
    try:
        Push(build, Target(_REPO)).plan()
    except PipelineError as error:
        return type(error).__name__
    return "ok"


def ask_check(signed: Signed, build: Build, name: str) -> str:
    """`nf4 check`: the kind of the error; "ok" is wrong."""
    try:
        check(build.export, signed.public)
    except PipelineError as error:
        return type(error).__name__
    return "ok"


def ask_build(signed: Signed, build: Build, name: str) -> str:
    """`nf4 build`: the stages that it did again, and said so, until all was as before; or "fail".

    Anything else is "ok", and wrong.
    """
    recipe, notes = signed.recipe, Notes()
    request = DownloadRequest(str(signed.model), build_dir=build.root)
    _, results = run_build(request, recipe, CPU, notes)
    again = [stage for stage, result in results.items() if result.ran]
    if again and results["verify"].record.facts.verdict != "pass":
        return "fail"
    if not again:
        return "ok"
    left = {
        path for path, digest in contents(build).items() if digest != contents(signed).get(path)
    }
    # Times and answers' speeds stand in what was measured anew.
    left -= {*DOCUMENTS, *ATTESTED, SIGNATURE_FILE}
    if left or ask_status(signed, build, name) != "ok" or not notes.said:
        return "ok"
    return "again: " + ", ".join(again)


def contents(build: Build | Signed) -> dict[str, bytes | None]:
    """Every file of an export; None for a link."""
    export = build.root / "export"
    return {
        name: None if path.is_symlink() else path.read_bytes()
        for name, path in entries(export).items()
    }


ASKED: Final[dict[str, Callable[[Signed, Build, str], str]]] = {
    "status": ask_status,
    "push": ask_push,
    "check": ask_check,
    "verify": ask_verify,
    "build": ask_build,
}
"""By command, those that change nothing first."""


def ask_all(signed: Signed, folder: Path, kind: str, name: str) -> dict[str, str]:
    """What each command says of a build that is damaged in one way."""
    said = {}
    for command, ask in ASKED.items():
        build, file = damaged(signed, folder / command, kind, name)
        said[command] = ask(signed, build, file)
        shutil.rmtree(build.root)
    return said
