"""A name -> a checkpoint that was found, looked at and hashed; on the Hub, fetched as well."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from nf4_pipeline.build_folder import Build
from nf4_pipeline.build_folder.spec import SourcePin
from nf4_pipeline.checkpoint.digest import (
    FileDigest,
    FileStamp,
    content_sha256,
    digest_file,
    digest_files,
)
from nf4_pipeline.checkpoint.files import CARD_FILE, PICKLE_FILE, is_of_tokenizer, is_wanted
from nf4_pipeline.checkpoint.folder_advice import cache_commit
from nf4_pipeline.checkpoint.model_name import SAMPLE, model_path
from nf4_pipeline.checkpoint.plain_file import read_beginning
from nf4_pipeline.checkpoint.skeleton import make_skeleton
from nf4_pipeline.checkpoint.source import Checkpoint, open_checkpoint, weight_files
from nf4_pipeline.checkpoint.source_card import read_card
from nf4_pipeline.checkpoint.strip_prefix import check_prefix, copy_without_prefix
from nf4_pipeline.checkpoint.untrusted import check_file
from nf4_pipeline.errors import BuildError, SourceError
from nf4_pipeline.hub.remote import RemoteModel
from nf4_pipeline.hub.xet import keep_no_chunks
from nf4_pipeline.model.tokenizer_facts import TokenizerFacts
from nf4_pipeline.processes.temporary import TemporaryFolder
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.records import DownloadFacts, Reading
from nf4_pipeline.sample import MODEL_DIR, SAMPLE_REPO
from nf4_pipeline.stages.download_request import DownloadRequest
from nf4_pipeline.stages.hub_files import LOOK, HubFiles, SeenOnHub
from nf4_pipeline.stages.preflight import (
    Findings,
    Preflight,
    check_headers,
    check_small_files,
    look,
)

_UNSEEN: Final = "what would become of its weights is only known"

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
        found_in: the local folder that was named; None for a model of the Hub.
        starts: of files that stay on the Hub, the first bytes with the header, by name.
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
    found_in: Path | None = None
    starts: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def here(self) -> dict[str, FileDigest]:
        """Those of its files that do not stay on the Hub."""
        return {name: digest for name, digest in self.files.items() if name not in self.starts}

    @property
    def pin(self) -> SourcePin:
        """Which checkpoint it is."""
        return _pin(self.repo, self.commit, self.converted_from or self.files, self.found_in)

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
            streamed={name: self.files[name] for name in sorted(self.starts)} or None,
        )


@dataclass(frozen=True)
class Place:
    """Where a checkpoint is, before anything in it is looked at.

    Attributes:
        folder: where its files are, or will be.
        repo: Hub id, or the name of the local folder.
        commit: of a Hub model; of a snapshot in the Hub cache, the one that it is said to be.
        is_sample: it is the model that comes with the package.
        model: what the Hub lists; None for a local folder.
    """

    folder: Path
    repo: str
    commit: str | None = None
    is_sample: bool = False
    model: RemoteModel | None = None

    @property
    def pin(self) -> SourcePin:
        """Which checkpoint it is, as far as is known without its files."""
        return SourcePin(repo=self.repo, commit=self.commit, sha256=None)

    def files(self, *, weights: bool = True) -> set[str]:
        """The names of what would be taken, but for what only the tokenizer's class knows.

        Args:
            weights: take those of weights and their index, too.

        Raises:
            SourceError: there is no checkpoint.
        """
        return set(_wanted_in(self.folder) if weights else _small_files_in(self.folder))


@dataclass(frozen=True)
class Preview:
    """A checkpoint whose weights nobody has read yet.

    Attributes:
        checkpoint: its headers; not all of its weights need to be there.
        found: what transformers says of its model.
        weights: its files of weights, with their sizes in bytes.
        missing: those of them that would have to be fetched.
    """

    checkpoint: Checkpoint
    found: Findings
    weights: Mapping[str, int]
    missing: Mapping[str, int]


@dataclass(frozen=True)
class SourceFinder:
    """Finds, checks and hashes a checkpoint."""

    request: DownloadRequest
    reporter: Reporter = SILENT
    stamps: dict[Path, FileStamp] = field(default_factory=dict, init=False, repr=False)
    """Of files that were hashed, from before that; by where they are, with all links followed."""
    _unchecked: set[str] = field(default_factory=set, init=False, repr=False)
    """Files that the Hub listed without a hash, by name."""

    def locate(self) -> Place:
        """Where it is; asks the Hub for the commit.

        Raises:
            HubError: the Hub could not be asked.
            UsageError: the request means nothing.
        """
        request = self.request
        request.check_names()
        if request.is_folder:
            folder = model_path(request.model).resolve()
            return Place(folder, *(cache_commit(folder) or (folder.name, None)))
        if request.model == SAMPLE:
            return Place(MODEL_DIR.resolve(), SAMPLE_REPO, is_sample=True)
        from nf4_pipeline import hub

        with self.reporter.task("ask the Hub", None):
            model = hub.resolve(request.model, request.revision, offline=request.offline or None)
        folder = hub.snapshot(model.repo_id, model.commit)
        return Place(folder, model.repo_id, model.commit, model=model)

    def keep(self, place: Place) -> None:
        """Says of a Hub model that nothing more of it is needed: the cache's ref moves."""
        if place.model is not None:
            from nf4_pipeline import hub

            hub.fetch(place.model, (), self.reporter, last=True)

    def find(self, place: Place) -> Source:
        """Looks at it and hashes it.

        Raises:
            SourceError: the checkpoint is not usable; nothing was written.
            HubError: the Hub sent wrong bytes.
        """
        source = self._find(place)
        taken = {*source.files, *(source.converted_from or ())}
        unchecked = tuple(sorted(taken & self._unchecked))
        return replace(source, reading=self.request.reading, unchecked=unchecked)

    @contextmanager
    def preview(self, place: Place) -> Iterator[Preview]:
        """What is known of it before its weights are fetched or hashed, from their headers.

        Of a Hub model, the small files are fetched, and the beginning of each file of weights.

        Raises:
            SourceError: the checkpoint is not usable, or nothing can be known of its weights before
                they are read: pickles, and names with a prefix that is to be stripped.
            HubError: the Hub could not be asked, or sent wrong bytes.
        """
        if self.request.reading.strip_prefix:
            raise SourceError(f"{place.repo}: {_UNSEEN} once the copy without a prefix is made.")
        if place.model is None:
            check_small_files(place.folder)
            if self.request.allow_pickle and weight_files(place.folder) is None:
                raise SourceError(f"{place.folder}: {_UNSEEN} once its pickles are converted.")
            with self.reporter.task(LOOK, None):
                found = look(place.folder, self.request.reading)
            checkpoint = open_checkpoint(place.folder)
            sizes = {name: checkpoint.path(name).stat().st_size for name in checkpoint.files}
            yield Preview(checkpoint, found, sizes, {})
            return
        hub_files = self._hub_files(place.model)
        seen = hub_files.look(claimed=False)
        if seen is None:
            raise SourceError(f"{place.repo}: {_UNSEEN} once its pickles are converted.")
        sizes = {part.path: part.size for part in seen.parts}
        if not seen.starts:
            yield Preview(open_checkpoint(hub_files.folder), seen.found, sizes, {})
            return
        missing = {
            name: size for name, size in sizes.items() if not (hub_files.folder / name).is_file()
        }
        with TemporaryFolder("look") as made:
            holes = {name: (seen.starts[name], size) for name, size in sizes.items()}
            make_skeleton(made, hub_files.folder, hub_files.digests, holes)
            yield Preview(open_checkpoint(made), seen.found, sizes, missing)

    def _find(self, place: Place) -> Source:
        if place.model is not None:
            return self._find_on_hub(place.model)
        source = self._find_local(place.folder, place.repo, is_sample=place.is_sample)
        source = replace(source, found_in=place.folder)
        if place.commit is None or source.converted_from is not None:
            return source
        from nf4_pipeline.hub.cache import are_blobs

        # The commit counts if every file is what the Hub listed.
        proved = are_blobs(place.folder, source.files)
        return replace(source, commit=place.commit) if proved else source

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
        with self.reporter.task(LOOK, None):
            found = preflight.wait()
        files = _with_tokenizer(folder, files, found.tokenizer)
        return Source(folder, repo, None, files, found, is_sample)

    def _hash(
        self, paths: Mapping[str, Path], preflight: Preflight | None = None
    ) -> dict[str, FileDigest]:
        """Hashes files, until `preflight` finds something wrong."""
        stamps = {path.resolve(): FileStamp.of(path) for path in paths.values()}
        self.stamps.update(stamps)
        total = sum(stamp.size for stamp in stamps.values())
        with self.reporter.task("hash source", total) as task:
            if preflight is None:
                return digest_files(paths, task)
            with preflight.beside(task) as watched:
                return digest_files(paths, watched)

    def _find_on_hub(self, model: RemoteModel) -> Source:
        if self.request.stream:
            keep_no_chunks()
        hub_files = self._hub_files(model)
        try:
            return self._fetch_all(hub_files)
        finally:
            self.stamps.update(hub_files.stamps)
            self._unchecked.update(hub_files.unchecked)

    def _hub_files(self, model: RemoteModel) -> HubFiles:
        request = self.request
        return HubFiles(
            model, request.reading, request.allow_pickle, request.allow_unhashed, self.reporter
        )

    def _fetch_all(self, hub_files: HubFiles) -> Source:
        repo, commit = hub_files.model.repo_id, hub_files.model.commit
        seen = hub_files.look()
        if seen is None:
            hub_files.fetch_whole()
            return self._convert(hub_files.folder, repo, commit, hub_files.digests)
        if self.request.stream and seen.starts:
            return _streamed(hub_files, seen)
        hub_files.fetch(seen.parts, last=True)
        folder, found = hub_files.folder, seen.found
        if not _begin_so(folder, seen.starts):
            with self.reporter.task(LOOK, None):
                found = look(folder, self.request.reading)
            found.tokenizer.check()
        taken = {*_wanted_in(folder), *seen.more}
        files = {name: digest for name, digest in hub_files.digests.items() if name in taken}
        if self.request.reading.strip_prefix:
            return self._strip_prefix(folder, repo, commit, files)
        files = _with_tokenizer(folder, files, found.tokenizer)
        return Source(folder, repo, commit, files, found)

    def _convert(
        self, folder: Path, repo: str, commit: str | None, files: Mapping[str, FileDigest]
    ) -> Source:
        """A checkpoint of pickles, as safetensors in converted/ of the build folder."""
        from nf4_pipeline.pickles.convert import convert

        pin = _pin(repo, commit, files, None if commit else folder)
        build = self.request.build(pin.slug)
        target = build.root.resolve() / "converted"
        with locked_soon(build):
            self.request.keep(build, pin)
            made = convert(folder, files, target, self.reporter)
        return self._made(target, made, repo, commit, files)

    def _strip_prefix(
        self, folder: Path, repo: str, commit: str | None, files: Mapping[str, FileDigest]
    ) -> Source:
        """A checkpoint with a wrapper's prefix, copied without it into converted/."""
        pin = _pin(repo, commit, files, None if commit else folder)
        build = self.request.build(pin.slug)
        target = build.root.resolve() / "converted"
        prefix = self.request.reading.strip_prefix
        with locked_soon(build):
            self.request.keep(build, pin)
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
        with self.reporter.task(LOOK, None):
            found = Preflight(target, self.request.reading.allow_unused).wait()
        made = _with_tokenizer(target, made, found.tokenizer)
        return Source(target, repo, commit, made, found, converted_from=files)


def _streamed(hub_files: HubFiles, seen: SeenOnHub) -> Source:
    """A checkpoint whose weights are what the Hub lists; that they are is proved as they pass.

    Raises:
        SourceError: the Hub lists no sha256 of a file of weights.
    """
    model, found = hub_files.model, seen.found
    taken = {*_small_files_in(hub_files.folder), *seen.more, seen.index}
    files = {name: digest for name, digest in hub_files.digests.items() if name in taken}
    for part in seen.parts:
        if part.sha256 is None:
            raise SourceError(
                f"{model.repo_id}@{model.commit[:12]}: the Hub lists no sha256 of {part.path}, by "
                "which it could be named before it is here. Leave --stream-source out."
            )
        files[part.path] = FileDigest(part.size, part.sha256)
    files = _with_tokenizer(hub_files.folder, files, found.tokenizer)
    return Source(hub_files.folder, model.repo_id, model.commit, files, found, starts=seen.starts)


def _begin_so(folder: Path, starts: Mapping[str, bytes]) -> bool:
    """Whether the files are those whose first bytes were looked at."""
    return all(read_beginning(folder / name, len(start)) == start for name, start in starts.items())


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
def locked_soon(build: Build) -> Iterator[None]:
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


def _pin(
    repo: str, commit: str | None, files: Mapping[str, FileDigest], folder: Path | None
) -> SourcePin:
    return SourcePin(
        repo=repo,
        commit=commit,
        sha256=content_sha256(files),
        folder=None if folder is None else str(folder),
    )


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
