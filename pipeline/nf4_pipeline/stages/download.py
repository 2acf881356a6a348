"""A name -> a pinned, hashed checkpoint in source/, which holds links and no copies."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.checkpoint.atomic import make_folder, sync_folder
from nf4_pipeline.checkpoint.digest import (
    FileDigest,
    FileStamp,
    content_sha256,
    digest_files,
    json_sha256,
)
from nf4_pipeline.checkpoint.files import PICKLE_FILE, is_wanted
from nf4_pipeline.checkpoint.source import has_weights, open_checkpoint
from nf4_pipeline.checkpoint.untrusted import check_folder
from nf4_pipeline.errors import BuildError, UsageError
from nf4_pipeline.model.architecture import Architecture
from nf4_pipeline.model.config import check_not_quantized, read_config
from nf4_pipeline.model.config_limits import check_config_limits
from nf4_pipeline.model.probe import Probe, transformers_version
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.records import DOWNLOAD, DownloadFacts
from nf4_pipeline.resource_usage import measured, peak_memory_of_children
from nf4_pipeline.runtime.artifact import ARTIFACTS, is_hub_id
from nf4_pipeline.stages.run_recorded import Outcome, run_recorded

CODE_VERSION: Final = 1
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
        stamps: of these files, from before they were hashed.
        model: what transformers says of its architecture.
        is_sample: it is the model that comes with the package.
        converted_from: the pickles, if the weights were such; `files` are what was made of them.
    """

    folder: Path
    repo: str
    commit: str | None
    files: Mapping[str, FileDigest]
    stamps: Mapping[str, FileStamp]
    model: Architecture
    is_sample: bool = False
    converted_from: Mapping[str, FileDigest] | None = None

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
            model=self.model,
            converted_from=dict(sorted((self.converted_from or {}).items())),
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
    """

    model: str
    artifacts: Path = ARTIFACTS
    revision: str | None = None
    build_dir: Path | None = None
    offline: bool = False
    allow_pickle: bool = False

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

    def run(self) -> Downloaded:
        """Does the work, as far as it is not done.

        Raises:
            SourceError: the checkpoint is not usable; nothing was written.
            HubError: the Hub could not be asked, or sent wrong bytes.
            UsageError: the request means nothing, or the build folder holds something else.
        """
        with measured() as finding:
            source = self._find()
        finding.peak_memory = max(finding.peak_memory, peak_memory_of_children())
        build = self.request.build(source.slug)
        _refuse_foreign_folders(build, source)
        facts = source.facts()
        key = json_sha256(
            {
                "code": CODE_VERSION,
                "source": facts.identity,
                "at": str(source.folder),
                "transformers": transformers_version(),
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
            stamps = {f"source/{name}": stamp for name, stamp in source.stamps.items()}
            record = run_recorded(build, DOWNLOAD, key, work, before=finding, stamps=stamps)
            return Downloaded(build, record, ran=True)

    def _find(self) -> Source:
        model = self.request.model
        path = Path(model).expanduser()
        if path.is_dir():
            self._refuse_revision()
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

    def _find_local(self, folder: Path, repo: str, *, is_sample: bool = False) -> Source:
        pickles = self.request.allow_pickle and not has_weights(folder) and _pickles_in(folder)
        if pickles:
            files = self._hash({**_small_files_in(folder), **pickles})
            return self._convert(folder, repo, None, files)
        _check(folder)
        probe = Probe(folder)
        try:
            paths = _wanted_in(folder)
            stamps = _stamps(paths)
            files = self._hash(paths)
        except BaseException:
            probe.cancel()
            raise
        return Source(folder, repo, None, files, stamps, probe.wait(), is_sample)

    def _hash(self, paths: Mapping[str, Path]) -> dict[str, FileDigest]:
        total = sum(path.stat().st_size for path in paths.values())
        with self.reporter.task("hash source", total) as task:
            return digest_files(paths, task)

    def _find_on_hub(self) -> Source:
        from nf4_pipeline import hub

        request, repo = self.request, self.request.model
        model = hub.resolve(repo, request.revision, offline=request.offline or None)
        wanted = hub.wanted_files(model, allow_pickle=request.allow_pickle)
        fetched = hub.fetch(model, wanted, self.reporter)
        folder = fetched.folder
        files = {
            name: FileDigest((folder / name).stat().st_size, sha256)
            for name, sha256 in fetched.sha256.items()
        }
        if any(PICKLE_FILE.fullmatch(name) for name in files):
            return self._convert(folder, repo, model.commit, files)
        _check(folder)
        return Source(folder, repo, model.commit, files, fetched.stamps, Probe(folder).wait())

    def _convert(
        self, folder: Path, repo: str, commit: str | None, files: Mapping[str, FileDigest]
    ) -> Source:
        """A checkpoint of pickles, as safetensors in converted/ of the build folder."""
        from nf4_pipeline.pickles.convert import convert

        check_folder(folder)
        check_not_quantized(read_config(folder), folder)
        build = self.request.build(_slug(repo, commit, files))
        target = build.root.resolve() / "converted"
        with _locked_soon(build):
            made = convert(folder, files, target, self.reporter)
        _check(target)
        stamps = _stamps({name: target / name for name in made})
        return Source(
            target, repo, commit, made, stamps, Probe(target).wait(), converted_from=files
        )


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


def _stamps(paths: Mapping[str, Path]) -> dict[str, FileStamp]:
    return {name: FileStamp.of(path) for name, path in paths.items()}


def _slug(repo: str, commit: str | None, files: Mapping[str, FileDigest]) -> str:
    return f"{repo.replace('/', '--')}@{(commit or content_sha256(files))[:12]}"


def _check(folder: Path) -> None:
    """Everything that can be known without reading weights or asking transformers."""
    check_folder(folder)
    config = read_config(folder)
    check_not_quantized(config, folder)
    check_config_limits(config, open_checkpoint(folder))


def _wanted_in(folder: Path) -> dict[str, Path]:
    weights = set(open_checkpoint(folder).files)
    return {name: folder / name for name in sorted({*weights, *_small_files_in(folder)})}


def _small_files_in(folder: Path) -> dict[str, Path]:
    """What is taken beside the weights."""
    paths = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    names = sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())
    return {
        name: folder / name
        for name in names
        if is_wanted(name) and not name.endswith(".safetensors")
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
