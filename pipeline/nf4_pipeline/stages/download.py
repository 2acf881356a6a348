"""A name -> a pinned, hashed checkpoint in source/, which holds links and no copies."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.build_folder import Build, Record, digests_json, stage_key
from nf4_pipeline.checkpoint.atomic import make_folder, sync_folder
from nf4_pipeline.checkpoint.digest import FileDigest, digest_file, digest_files
from nf4_pipeline.checkpoint.files import PICKLE_FILE, is_of_tokenizer, is_wanted
from nf4_pipeline.checkpoint.folder_advice import cache_commit
from nf4_pipeline.checkpoint.source import open_checkpoint, read_json, weight_files
from nf4_pipeline.checkpoint.strip_prefix import check_prefix, copy_without_prefix
from nf4_pipeline.checkpoint.untrusted import check_file
from nf4_pipeline.checkpoint.weight_files import choose_weight_files
from nf4_pipeline.errors import BuildError, UsageError
from nf4_pipeline.model.architecture import ModelFacts
from nf4_pipeline.model.config import read_config
from nf4_pipeline.model.probe import transformers_version
from nf4_pipeline.model.tokenizer_facts import TokenizerFacts
from nf4_pipeline.model.unused_tensors import is_worth_saying
from nf4_pipeline.progress import Reporter
from nf4_pipeline.resource_usage import measured, peak_memory_of_children
from nf4_pipeline.runtime.artifact import is_hub_id
from nf4_pipeline.stages import recorded
from nf4_pipeline.stages.preflight import (
    Findings,
    Preflight,
    check_headers,
    check_small_files,
)

CODE_VERSION: Final = 2
SAMPLE: Final = "sample"

_LOCK_PATIENCE: Final = 5.0  # seconds


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found, checked and hashed.

    Attributes:
        folder: where its files are.
        repo: Hub id, or the name of the local folder.
        commit: 40 hex digits for a Hub model, else None.
        files: digest of each file that is taken.
        found: what is known of it without its weights.
        is_sample: it is the model that comes with the package.
        converted_from: what was found, if the weights were pickles, or a prefix was stripped;
            `files` are what was made.
    """

    folder: Path
    repo: str
    commit: str | None
    files: Mapping[str, FileDigest]
    found: Findings
    is_sample: bool = False
    converted_from: Mapping[str, FileDigest] | None = None

    @property
    def content_sha256(self) -> str:
        """One hash over all files: sha256 of the sorted lines `sha256  name`."""
        return _content_sha256(self.files)

    @property
    def slug(self) -> str:
        """The name of its build folder: `<org>--<name>@<12 digits>`."""
        return _slug(self.repo, self.commit, self.converted_from or self.files)

    def identity(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"repo": self.repo, "commit": self.commit, "content_sha256": self.content_sha256}


def run(
    model: str,
    artifacts: Path,
    reporter: Reporter,
    *,
    revision: str | None = None,
    build_dir: Path | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    allow_unused: Sequence[str] = (),
    strip_prefix: str = "",
) -> tuple[Build, Record, bool]:
    """Finds, checks and hashes a checkpoint, and makes or refreshes its build folder.

    Args:
        model: Hub id, local folder, or "sample".
        artifacts: the folder that holds builds.
        reporter: told how far it is.
        revision: of a Hub model; a branch, a tag or a commit.
        build_dir: the build folder, if not the default one.
        offline: take a Hub model as it is cached; HF_HUB_OFFLINE says so, too.
        allow_pickle: convert weights that are pickles, where there are no others.
        allow_unused: patterns of tensors that the model has no place for and may be left out.
        strip_prefix: what stands before the names of all tensors; a copy without it is made.

    Returns:
        The build folder, the record, and whether anything had to be done.

    Raises:
        SourceError: the checkpoint is not usable; nothing was written.
        HubError: the Hub could not be asked, or sent wrong bytes.
    """
    asked = _Asked(
        revision,
        offline,
        allow_pickle,
        tuple(allow_unused),
        strip_prefix,
        lambda slug: build_dir or artifacts / slug,
    )
    with measured() as finding:
        source = _find(model, asked, reporter)
    finding.peak_memory = max(finding.peak_memory, peak_memory_of_children())
    for note in source.found.tokenizer.notes(source.repo):
        reporter.note(note)
    build = Build(build_dir or artifacts / source.slug)
    _refuse_foreign_folders(build, source)
    key = stage_key(
        {
            "code": CODE_VERSION,
            "source": source.identity(),
            "at": str(source.folder),
            "transformers": transformers_version(),
            "allow_unused": asked.allow_unused,
        }
    )

    def standing() -> Record | None:
        record = build.record("download")
        same = record is not None and record.key == key and _links_stand(build, source)
        return record if same else None

    if record := standing():
        return build, record, False
    with _locked_soon(build):
        if record := standing():
            return build, record, False

        def work() -> tuple[dict[str, Any], dict[str, Any]]:
            _link(build, source)
            outputs = {f"source/{name}": digest for name, digest in source.files.items()}
            return outputs, {
                **source.identity(),
                "is_sample": source.is_sample,
                "model": source.found.model.as_json(),
                "reading": {
                    "allow_unused": list(asked.allow_unused),
                    "strip_prefix": asked.strip_prefix,
                },
                "tokenizer": source.found.tokenizer.as_json(),
                "unused": {
                    tensor.name: tensor.reason
                    for tensor in source.found.unused
                    if is_worth_saying(tensor.reason or "")
                },
                "converted_from": digests_json(source.converted_from or {}),
            }

        return build, recorded(build, "download", key, work, before=finding), True


@contextmanager
def _locked_soon(build: Build) -> Iterator[None]:
    """Holds the build folder; another download of the same model has it for a moment only."""
    end = time.monotonic() + _LOCK_PATIENCE
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(build.locked())
                break
            except BuildError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        yield


def recorded_facts(record: Record) -> ModelFacts:
    """What transformers said of the architecture when the checkpoint was downloaded."""
    return ModelFacts.from_json(record.facts["model"])


def recorded_tokenizer(record: Record) -> TokenizerFacts | None:
    """What was found of the tokenizer; None in a record of an older version."""
    found = record.facts.get("tokenizer")
    return TokenizerFacts.from_json(found) if found else None


def download_notes(record: Record) -> list[str]:
    """What a person should know of a checkpoint before, and at the end of, hours of work."""
    found = recorded_tokenizer(record)
    return found.notes(str(record.facts["repo"])) if found else []


def recorded_files(record: Record) -> dict[str, FileDigest]:
    """The source files of a download record, by name."""
    return {path.removeprefix("source/"): digest for path, digest in record.outputs.items()}


@dataclass(frozen=True)
class _Asked:
    """How a checkpoint is to be found; `root` gives the build folder for a slug."""

    revision: str | None
    offline: bool
    allow_pickle: bool
    allow_unused: tuple[str, ...]
    strip_prefix: str
    root: Callable[[str], Path]


def _find(model: str, asked: _Asked, reporter: Reporter) -> Source:
    path = Path(model).expanduser()
    if path.is_dir():
        _refuse_revision(model, asked)
        snapshot = cache_commit(path.resolve())
        if snapshot is not None:
            return _snapshot(path.resolve(), *snapshot, asked, reporter)
        return _local(path.resolve(), path.resolve().name, asked, reporter)
    if model == SAMPLE:
        _refuse_revision(model, asked)
        from nf4_pipeline.sample import MODEL_DIR

        return _local(MODEL_DIR.resolve(), "nf4-pipeline/sample", asked, reporter, is_sample=True)
    if is_hub_id(model):
        return _hub(model, asked, reporter)
    raise UsageError(f"{model}: no such folder, and not a Hub id of the form ORG/NAME.")


def _snapshot(folder: Path, repo: str, commit: str, asked: _Asked, reporter: Reporter) -> Source:
    """A snapshot in a Hub cache: its commit is believed if every file is what the Hub listed."""
    from nf4_pipeline.hub.cache import are_blobs

    source = _local(folder, repo, asked, reporter)
    if source.converted_from is None and are_blobs(folder, source.files):
        return replace(source, commit=commit)
    return source


def _refuse_revision(model: str, asked: _Asked) -> None:
    if asked.revision is not None:
        raise UsageError(f"--revision {asked.revision} means nothing for {model}, a local folder.")


def _local(
    folder: Path, repo: str, asked: _Asked, reporter: Reporter, *, is_sample: bool = False
) -> Source:
    check_small_files(folder)
    pickles = asked.allow_pickle and weight_files(folder) is None and _pickles_in(folder)
    if pickles:
        files = _hashed({**_small_files_in(folder), **pickles}, reporter)
        return _converted(folder, repo, None, files, asked, reporter)
    check_headers(folder)
    if asked.strip_prefix:
        check_prefix(open_checkpoint(folder), asked.strip_prefix)
        files = _hashed(_wanted_in(folder), reporter)
        return _without_prefix(folder, repo, None, files, asked, reporter)
    preflight = Preflight(folder, asked.allow_unused)
    files = _hashed(_wanted_in(folder), reporter, preflight)
    found = preflight.wait()
    return Source(folder, repo, None, _with_tokenizer(folder, files, found), found, is_sample)


def _hashed(
    paths: Mapping[str, Path], reporter: Reporter, preflight: Preflight | None = None
) -> dict[str, FileDigest]:
    """Hashes files, until `preflight` finds something wrong."""
    total = sum(path.stat().st_size for path in paths.values())
    with reporter.task("hash source", total) as task:
        if preflight is None:
            return digest_files(paths, task)
        with preflight.beside(task) as watched:
            return digest_files(paths, watched)


def _with_tokenizer(
    folder: Path, files: Mapping[str, FileDigest], found: Findings
) -> dict[str, FileDigest]:
    """The files that are taken: with all that the tokenizer's class asks for.

    Without any, if it needs code of its own: what is left of it would load nowhere.
    """
    if found.tokenizer.status == "code":
        asked = set(found.tokenizer.files)
        return {
            name: digest
            for name, digest in files.items()
            if not is_of_tokenizer(name) and name not in asked
        }
    more = [name for name in found.tokenizer.files if name not in files]
    for name in more:
        check_file(folder, name)
    return {**files, **{name: digest_file(folder / name) for name in more}}


def _hub(repo: str, asked: _Asked, reporter: Reporter) -> Source:
    from nf4_pipeline import hub

    model = hub.resolve(repo, asked.revision, offline=asked.offline or None)
    files: dict[str, FileDigest] = {}

    def fetch(wanted: Iterable[hub.RemoteFile], *, last: bool = False) -> Path:
        fetched = hub.fetch(model, tuple(wanted), reporter, last=last)
        for name, sha256 in fetched.sha256.items():
            files[name] = FileDigest((fetched.folder / name).stat().st_size, sha256)
        return fetched.folder

    whole = hub.wanted_files(model, allow_pickle=asked.allow_pickle)  # or there are no weights
    folder = fetch(hub.small_files(model))
    check_small_files(folder)
    weights = choose_weight_files(
        {file.path for file in model.files if "/" not in file.path},
        read_config(folder),
        lambda name: read_json(folder / name),
        f"{repo}@{model.commit[:12]}",
    )
    if weights is None:
        fetch((file for file in whole if file.path not in files), last=True)
        return _converted(folder, repo, model.commit, files, asked, reporter)
    # What its config and its tokenizer say is known before the first weight is fetched.
    asked_for = Preflight(folder, without_weights=True).wait().tokenizer.asked
    more = [file for file in hub.named(model, asked_for) if file.path not in files]
    if more:
        fetch(more)
        Preflight(folder, without_weights=True).wait()
    fetch(hub.named(model, weights.files), last=True)
    check_headers(folder)
    taken = {*_wanted_in(folder), *(file.path for file in more)}
    files = {name: digest for name, digest in files.items() if name in taken}
    if asked.strip_prefix:
        check_prefix(open_checkpoint(folder), asked.strip_prefix)
        return _without_prefix(folder, repo, model.commit, files, asked, reporter)
    found = Preflight(folder, asked.allow_unused).wait()
    return Source(folder, repo, model.commit, _with_tokenizer(folder, files, found), found)


def _converted(
    folder: Path,
    repo: str,
    commit: str | None,
    files: Mapping[str, FileDigest],
    asked: _Asked,
    reporter: Reporter,
) -> Source:
    """A checkpoint of pickles, as safetensors in converted/ of the build folder."""
    from nf4_pipeline.pickles.convert import convert

    build = Build(asked.root(_slug(repo, commit, files)))
    target = build.root.resolve() / "converted"
    with _locked_soon(build):
        made = convert(folder, files, target, reporter)
    return _made(target, made, repo, commit, files, asked)


def _without_prefix(
    folder: Path,
    repo: str,
    commit: str | None,
    files: Mapping[str, FileDigest],
    asked: _Asked,
    reporter: Reporter,
) -> Source:
    """A checkpoint with a wrapper's prefix, copied without it into converted/."""
    build = Build(asked.root(_slug(repo, commit, files)))
    target = build.root.resolve() / "converted"
    with _locked_soon(build):
        made = copy_without_prefix(folder, files, asked.strip_prefix, target, reporter)
    return _made(target, made, repo, commit, files, asked)


def _made(
    target: Path,
    made: Mapping[str, FileDigest],
    repo: str,
    commit: str | None,
    files: Mapping[str, FileDigest],
    asked: _Asked,
) -> Source:
    """The checkpoint in converted/, looked at like any other."""
    check_small_files(target)
    check_headers(target)
    found = Preflight(target, asked.allow_unused).wait()
    made = _with_tokenizer(target, made, found)
    return Source(target, repo, commit, made, found, converted_from=files)


def _content_sha256(files: Mapping[str, FileDigest]) -> str:
    lines = sorted(f"{digest.sha256}  {name}\n" for name, digest in files.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _slug(repo: str, commit: str | None, files: Mapping[str, FileDigest]) -> str:
    return f"{repo.replace('/', '--')}@{(commit or _content_sha256(files))[:12]}"


def _wanted_in(folder: Path) -> dict[str, Path]:
    checkpoint = open_checkpoint(folder)
    weights = {*checkpoint.files, *([checkpoint.index] if checkpoint.index else [])}
    return {name: folder / name for name in sorted({*weights, *_small_files_in(folder)})}


def _small_files_in(folder: Path) -> dict[str, Path]:
    """What is taken beside the weights and their index."""
    paths = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    names = sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())
    return {
        name: folder / name
        for name in names
        if is_wanted(name) and not name.endswith((".safetensors", ".safetensors.index.json"))
    }


def _pickles_in(folder: Path) -> dict[str, Path]:
    paths = sorted(folder.glob("pytorch_model*.bin"))
    return {path.name: path for path in paths if PICKLE_FILE.fullmatch(path.name)}


def _refuse_foreign_folders(build: Build, source: Source) -> None:
    """A build empties its folders; they must be its own, and the source must not be among them.

    Raises:
        UsageError: the build folder holds something that no build left there.
    """
    own = [build.source, build.quantized, build.export]
    inside = [folder for folder in own if source.folder.is_relative_to(folder.resolve())]
    foreign = [] if (build.root / "records").is_dir() else [f for f in own if f.exists()]
    if inside or foreign:
        raise UsageError(
            f"{build.root} cannot be the build folder: {(inside + foreign)[0]} is there already "
            "and is not part of a build. Name another --build-dir."
        )


def _links_stand(build: Build, source: Source) -> bool:
    return all(
        (build.source / name).resolve() == (source.folder / name).resolve() for name in source.files
    )


def _link(build: Build, source: Source) -> None:
    for old in sorted(build.source.rglob("*"), reverse=True):
        if old.is_symlink():
            old.unlink()
    for name in source.files:
        link = build.source / name
        make_folder(link.parent)
        link.symlink_to((source.folder / name).resolve())
    for folder in {(build.source / name).parent for name in source.files}:
        sync_folder(folder)
