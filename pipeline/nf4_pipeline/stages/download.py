"""A name -> a pinned, hashed checkpoint in source/, which holds links and no copies."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, NamedTuple

from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.checkpoint.atomic import make_folder, sync_folder
from nf4_pipeline.checkpoint.digest import (
    FileDigest,
    FileStamp,
    content_sha256,
    digest_file,
    digest_files,
    json_sha256,
)
from nf4_pipeline.checkpoint.files import CARD_FILE, PICKLE_FILE, is_of_tokenizer, is_wanted
from nf4_pipeline.checkpoint.folder_advice import cache_commit
from nf4_pipeline.checkpoint.named_path import named_path
from nf4_pipeline.checkpoint.source import open_checkpoint, read_json, weight_files
from nf4_pipeline.checkpoint.source_card import read_card
from nf4_pipeline.checkpoint.strip_prefix import check_prefix, copy_without_prefix
from nf4_pipeline.checkpoint.untrusted import check_file
from nf4_pipeline.checkpoint.weight_files import choose_weight_files
from nf4_pipeline.errors import BuildError, UsageError
from nf4_pipeline.model.config import read_config
from nf4_pipeline.model.probe import transformers_version
from nf4_pipeline.model.tokenizer_facts import TokenizerFacts
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.records import DOWNLOAD, DownloadFacts, Reading
from nf4_pipeline.resource_usage import measured, peak_memory_of_children
from nf4_pipeline.runtime.artifact import ARTIFACTS, is_hub_id
from nf4_pipeline.stages.preflight import Findings, Preflight, check_headers, check_small_files
from nf4_pipeline.stages.run_recorded import Outcome, run_recorded

CODE_VERSION: Final = 2
SAMPLE: Final = "sample"
SAMPLE_REPO: Final = "nf4-pipeline/sample"

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
        converted_from: the pickles, if the weights were such, or the files whose tensors had a
            prefix; `files` are what was made of them.
        reading: how its tensors are understood.
        unchecked: those of its files that the Hub listed without a hash.
    """

    folder: Path
    repo: str
    commit: str | None
    files: Mapping[str, FileDigest]
    found: Findings
    is_sample: bool = False
    converted_from: Mapping[str, FileDigest] | None = None
    reading: Reading = field(default_factory=Reading)
    unchecked: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The name of its build folder: `<org>--<name>@<12 digits>`."""
        return _slug(self.repo, self.commit, self.converted_from or self.files)

    def facts(self) -> DownloadFacts:
        """What the record says of it."""
        return DownloadFacts(
            repo=self.repo,
            commit=self.commit,
            content_sha256=content_sha256(self.files),
            is_sample=self.is_sample,
            model=self.found.architecture,
            converted_from=dict(sorted((self.converted_from or {}).items())),
            tokenizer=self.found.tokenizer,
            reading=self.reading,
            unchecked=self.unchecked or None,
            card=read_card(self.folder / CARD_FILE),
        )


@dataclass(frozen=True)
class DownloadRequest:
    """Which checkpoint is wanted, and where its build folder shall be.

    Attributes:
        model: Hub id, local folder, or "sample".
        artifacts: the folder that holds builds.
        revision: of a Hub model; a branch, a tag or a commit.
        build_dir: the build folder, if not the default one under `artifacts`.
        offline: take a Hub model as it is cached; HF_HUB_OFFLINE says so, too.
        allow_pickle: convert weights that are pickles, where there are no others.
        allow_unhashed: take files for which the Hub lists no hash, too.
        reading: how the tensors are understood.
    """

    model: str
    artifacts: Path = ARTIFACTS
    revision: str | None = None
    build_dir: Path | None = None
    offline: bool = False
    allow_pickle: bool = False
    allow_unhashed: bool = False
    reading: Reading = field(default_factory=Reading)

    def build(self, slug: str) -> Build:
        """The build folder; `slug` is the default name of it."""
        return Build(self.build_dir or self.artifacts / slug)


class Downloaded(NamedTuple):
    """A checkpoint in its build folder.

    Attributes:
        build: the build folder.
        record: what it holds.
        ran: whether anything had to be done.
    """

    build: Build
    record: Record[DownloadFacts]
    ran: bool


@dataclass(frozen=True)
class Download:
    """Finds, checks and hashes a checkpoint, and makes or refreshes its build folder."""

    request: DownloadRequest
    reporter: Reporter = SILENT
    _stamps: dict[Path, FileStamp] = field(default_factory=dict, init=False, repr=False)
    """Of files that were hashed, from before that; by where they are, with all links followed."""
    _unchecked: set[str] = field(default_factory=set, init=False, repr=False)
    """Files that the Hub listed without a hash, by name."""

    def run(self) -> Downloaded:
        """Does the work, as far as it is not done.

        Raises:
            SourceError: the checkpoint is not usable; nothing was written.
            HubError: the Hub could not be asked, or sent wrong bytes.
            UsageError: the request means nothing, or the build folder holds something else.
        """
        with measured() as finding:
            source = self._find()
            taken = {*source.files, *(source.converted_from or ())}
            unchecked = tuple(sorted(taken & self._unchecked))
            source = replace(source, reading=self.request.reading, unchecked=unchecked)
        finding.peak_memory = max(finding.peak_memory, peak_memory_of_children())
        build = self.request.build(source.slug)
        _refuse_foreign_folders(build, source)
        facts = source.facts()
        for note in facts.notes:
            self.reporter.note(note)
        key = json_sha256(
            {
                "code": CODE_VERSION,
                "source": facts.identity.to_json(),
                "at": str(source.folder),
                "transformers": transformers_version(),
                "reading": self.request.reading.to_json(),
            }
        )

        def standing() -> Record[DownloadFacts] | None:
            record = build.record(DOWNLOAD)
            same = record is not None and record.key == key and _links_stand(build, source)
            return record if same else None

        def work() -> Outcome[DownloadFacts]:
            _link(build, source)
            return {f"source/{name}": digest for name, digest in source.files.items()}, facts

        if record := standing():
            return Downloaded(build, record, ran=False)
        with _locked_soon(build):
            if record := standing():
                return Downloaded(build, record, ran=False)
            stamps = self._stamps_of(source)
            record = run_recorded(build, DOWNLOAD, key, work, before=finding, stamps=stamps)
            return Downloaded(build, record, ran=True)

    def _stamps_of(self, source: Source) -> dict[str, FileStamp]:
        """For the record: a file that changes after it was hashed is found to have changed."""
        places = {name: (source.folder / name).resolve() for name in source.files}
        return {
            f"source/{name}": self._stamps[place]
            for name, place in places.items()
            if place in self._stamps
        }

    def _find(self) -> Source:
        model = self.request.model
        path = named_path(model)
        if path.is_dir():
            self._refuse_revision()
            snapshot = cache_commit(path.resolve())
            if snapshot is not None:
                return self._find_snapshot(path.resolve(), *snapshot)
            return self._find_local(path.resolve(), path.resolve().name)
        if model == SAMPLE:
            self._refuse_revision()
            from nf4_pipeline.sample import MODEL_DIR

            return self._find_local(MODEL_DIR.resolve(), SAMPLE_REPO, is_sample=True)
        if is_hub_id(model):
            return self._find_on_hub()
        raise UsageError(f"{model}: no such folder, and not a Hub id of the form ORG/NAME.")

    def _refuse_revision(self) -> None:
        if self.request.revision is not None:
            raise UsageError(
                f"--revision {self.request.revision} means nothing for {self.request.model}, a "
                "local folder."
            )

    def _find_snapshot(self, folder: Path, repo: str, commit: str) -> Source:
        """A snapshot of the Hub cache: its commit counts if every file is what the Hub listed."""
        from nf4_pipeline.hub.cache import are_blobs

        source = self._find_local(folder, repo)
        if source.converted_from is None and are_blobs(folder, source.files):
            return replace(source, commit=commit)
        return source

    def _find_local(self, folder: Path, repo: str, *, is_sample: bool = False) -> Source:
        check_small_files(folder)
        if self.request.allow_pickle and weight_files(folder) is None and _pickles_in(folder):
            files = self._hash({**_small_files_in(folder), **_pickles_in(folder)})
            return self._convert(folder, repo, None, files)
        check_headers(folder)
        prefix, allow_unused = self.request.reading.strip_prefix, self.request.reading.allow_unused
        if prefix:
            check_prefix(open_checkpoint(folder), prefix)
            files = self._hash(_wanted_in(folder))
            return self._strip_prefix(folder, repo, None, files)
        preflight = Preflight(folder, allow_unused)
        files = self._hash(_wanted_in(folder), preflight)
        found = preflight.wait()
        files = _with_tokenizer(folder, files, found.tokenizer)
        return Source(folder, repo, None, files, found, is_sample)

    def _hash(
        self, paths: Mapping[str, Path], preflight: Preflight | None = None
    ) -> dict[str, FileDigest]:
        """Hashes files, until `preflight` finds something wrong."""
        stamps = {path.resolve(): FileStamp.of(path) for path in paths.values()}
        self._stamps.update(stamps)
        total = sum(stamp.size for stamp in stamps.values())
        with self.reporter.task("hash source", total) as task:
            if preflight is None:
                return digest_files(paths, task)
            with preflight.beside(task) as watched:
                return digest_files(paths, watched)

    def _find_on_hub(self) -> Source:
        from nf4_pipeline import hub

        request, repo = self.request, self.request.model
        model = hub.resolve(repo, request.revision, offline=request.offline or None)
        files: dict[str, FileDigest] = {}

        def fetch(wanted: Iterable[hub.RemoteFile], *, last: bool = False) -> Path:
            fetched = hub.fetch(
                model,
                tuple(wanted),
                self.reporter,
                allow_unhashed=request.allow_unhashed,
                last=last,
            )
            self._unchecked.update(fetched.unchecked)
            for name, sha256 in fetched.sha256.items():
                stamp = fetched.stamps[name]
                files[name] = FileDigest(stamp.size, sha256)
                self._stamps[(fetched.folder / name).resolve()] = stamp
            return fetched.folder

        whole = hub.wanted_files(model, allow_pickle=request.allow_pickle)  # or has no weights
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
            return self._convert(folder, repo, model.commit, files)
        # What its config and its tokenizer say is known before the first weight is fetched.
        asked = Preflight(folder, without_weights=True).wait().tokenizer.asked
        more = [file for file in hub.named(model, asked) if file.path not in files]
        if more:
            fetch(more)
        fetch(hub.named(model, weights.files), last=True)
        check_headers(folder)
        taken = {*_wanted_in(folder), *(file.path for file in more)}
        files = {name: digest for name, digest in files.items() if name in taken}
        if request.reading.strip_prefix:
            check_prefix(open_checkpoint(folder), request.reading.strip_prefix)
            return self._strip_prefix(folder, repo, model.commit, files)
        found = Preflight(folder, request.reading.allow_unused).wait()
        files = _with_tokenizer(folder, files, found.tokenizer)
        return Source(folder, repo, model.commit, files, found)

    def _convert(
        self, folder: Path, repo: str, commit: str | None, files: Mapping[str, FileDigest]
    ) -> Source:
        """A checkpoint of pickles, as safetensors in converted/ of the build folder."""
        from nf4_pipeline.pickles.convert import convert

        build = self.request.build(_slug(repo, commit, files))
        target = build.root.resolve() / "converted"
        with _locked_soon(build):
            made = convert(folder, files, target, self.reporter)
        return self._made(target, made, repo, commit, files)

    def _strip_prefix(
        self, folder: Path, repo: str, commit: str | None, files: Mapping[str, FileDigest]
    ) -> Source:
        """A checkpoint with a wrapper's prefix, copied without it into converted/."""
        build = self.request.build(_slug(repo, commit, files))
        target = build.root.resolve() / "converted"
        prefix = self.request.reading.strip_prefix
        with _locked_soon(build):
            made = copy_without_prefix(folder, files, prefix, target, self.reporter)
        return self._made(target, made, repo, commit, files)

    def _made(
        self,
        target: Path,
        made: Mapping[str, FileDigest],
        repo: str,
        commit: str | None,
        files: Mapping[str, FileDigest],
    ) -> Source:
        """The checkpoint in converted/, looked at like any other."""
        check_small_files(target)
        check_headers(target)
        found = Preflight(target, self.request.reading.allow_unused).wait()
        made = _with_tokenizer(target, made, found.tokenizer)
        return Source(target, repo, commit, made, found, converted_from=files)


def _with_tokenizer(
    folder: Path, files: Mapping[str, FileDigest], tokenizer: TokenizerFacts
) -> dict[str, FileDigest]:
    """The files that are taken: with all that the tokenizer's class asks for.

    Without any, if it needs code of its own: what is left of it would load nowhere.
    """
    if tokenizer.status == "code":
        return {
            name: digest
            for name, digest in files.items()
            if not is_of_tokenizer(name) and name not in tokenizer.files
        }
    more = [name for name in tokenizer.files if name not in files]
    for name in more:
        check_file(folder, name)
    return {**files, **{name: digest_file(folder / name) for name in more}}


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


def _slug(repo: str, commit: str | None, files: Mapping[str, FileDigest]) -> str:
    return f"{repo.replace('/', '--')}@{(commit or content_sha256(files))[:12]}"


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
        UsageError: the build folder holds something that no build left there, or the source.
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
