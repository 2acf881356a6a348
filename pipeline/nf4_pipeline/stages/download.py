"""A name -> a pinned, hashed checkpoint in source/, which holds links and no copies.

Weights that are streamed stay on the Hub: of them, the headers are kept.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from nf4_pipeline.build_folder import Build, Record
from nf4_pipeline.build_folder.spec import read_spec
from nf4_pipeline.builds import spec_of
from nf4_pipeline.checkpoint.atomic import make_folder, sync_folder, write_bytes
from nf4_pipeline.checkpoint.digest import FileDigest, FileStamp, json_sha256
from nf4_pipeline.errors import AccessError, SourceError, UsageError
from nf4_pipeline.model.probe import transformers_version
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.records import DOWNLOAD, DownloadFacts
from nf4_pipeline.resource_usage import measured, peak_memory_of_children
from nf4_pipeline.runtime.artifact import build_roots
from nf4_pipeline.stages.download_request import DownloadRequest
from nf4_pipeline.stages.find_source import Place, Source, SourceFinder, locked_soon
from nf4_pipeline.stages.run_recorded import Outcome, run_recorded
from nf4_pipeline.stages.streamed_source import header_path

CODE_VERSION: Final = 3
_NO_LINKS: Final = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)


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
    begin: Callable[[], None] = lambda: None

    def run(self) -> Downloaded:
        """Does the work, as far as it is not done.

        Raises:
            SourceError: the checkpoint is not usable; nothing was written.
            HubError: the Hub could not be asked, or sent wrong bytes.
            UsageError: the request means nothing, or the build folder holds something else.
            BuildError: the build folder is for another source or recipe.
            StoreError: the store at its URL refuses or does not answer, or holds something else.
        """
        finder = SourceFinder(self.request, self.reporter)
        with measured() as finding:
            place = finder.locate()
            pin = None if place.model is None else place.pin
            self.request.check_kept(pin, self.reporter)
            if (downloaded := self._unchanged(place)) is not None:
                if not downloaded.record.facts.streamed:
                    finder.keep(place)
                self._say(downloaded.record.facts)
                return downloaded
            self.begin()
            source = finder.find(place)
        finding.peak_memory = max(finding.peak_memory, peak_memory_of_children())
        build = self.request.build(source.pin.slug)
        _refuse_foreign_folders(build, source)
        facts = source.facts()
        self._say(facts)
        key = self._key(facts, source.folder)
        headers = {header_path(name): start for name, start in source.starts.items()}

        def standing() -> Record[DownloadFacts] | None:
            record = build.record(DOWNLOAD)
            same = (
                record is not None
                and record.key == key
                and _links_stand(build, source)
                and all((build.root / name).is_file() for name in headers)
            )
            return record if same else None

        def work() -> Outcome[DownloadFacts]:
            _link(build, source)
            for name, start in headers.items():
                make_folder((build.root / name).parent)
                write_bytes(build.root / name, start)
            outputs = {f"source/{name}": digest for name, digest in source.here.items()}
            return outputs | {n: FileDigest.of(start) for n, start in headers.items()}, facts

        stamps = _stamps_of(source, finder.stamps)
        with locked_soon(build):
            self.request.keep(build, source.pin)
            if record := standing():
                build.renew_stamps(DOWNLOAD, stamps)
                return Downloaded(build, record, ran=False)
            record = run_recorded(build, DOWNLOAD, key, work, before=finding, stamps=stamps)
            return Downloaded(build, record, ran=True)

    def _say(self, facts: DownloadFacts) -> None:
        for note in facts.notes:
            self.reporter.note(note)

    def _key(self, facts: DownloadFacts, folder: Path) -> str:
        parts = {
            "code": CODE_VERSION,
            "source": facts.identity.to_json(),
            "at": str(folder),
            "transformers": transformers_version(),
            "reading": self.request.reading.to_json(),
        }
        return json_sha256({**parts, "streamed": True} if facts.streamed else parts)

    def _unchanged(self, place: Place) -> Downloaded | None:
        """An earlier download of the same, of which nothing was touched since it was hashed.

        What was converted is always looked at again.
        """
        request = self.request
        if request.check:
            return None
        roots = [request.build_dir] if request.build_dir else build_roots(request.artifacts)
        for build in map(Build, roots):
            record = build.record(DOWNLOAD)
            if record is None or record.facts.repo != place.repo:
                continue
            facts = record.facts
            spec = spec_of(build)
            if spec is None or request.build(spec.source.slug).root != build.root:
                continue
            same = facts.commit == place.commit or (place.model is None and facts.commit is None)
            allowed = request.allow_unhashed or not facts.unchecked
            if (
                same
                and allowed
                and (request.stream or not facts.streamed)
                and not facts.converted_from
                and record.key == self._key(facts, place.folder)
                and _is_untouched(build, record, place)
            ):
                return Downloaded(build, record, ran=False)
        return None


def _is_untouched(build: Build, record: Record[DownloadFacts], place: Place) -> bool:
    """Whether the links lead to files that have their stamps, and no file has come to them."""
    names = record.outputs_in("source")
    tokenizer, streamed = record.facts.tokenizer, record.facts.streamed or {}
    asked = tokenizer.asked if tokenizer else ()
    try:
        return (
            place.files(weights=not streamed) <= {*names}
            and not any((place.folder / name).exists() for name in asked if name not in names)
            and all(
                (build.source / name).resolve() == (place.folder / name).resolve()
                and FileStamp.of(build.source / name) == record.stamps.get(f"source/{name}")
                for name in names
            )
            and all(
                FileStamp.of(build.root / name) == record.stamps.get(name)
                for name in map(header_path, streamed)
            )
        )
    except (OSError, SourceError):
        return False


def _stamps_of(source: Source, stamps: Mapping[Path, FileStamp]) -> dict[str, FileStamp]:
    """For the record: a file that changes after it was hashed is found to have changed."""
    places = {name: (source.folder / name).resolve() for name in source.here}
    return {f"source/{name}": stamps[place] for name, place in places.items() if place in stamps}


def _refuse_foreign_folders(build: Build, source: Source) -> None:
    """A build empties its folders; they must be its own, and the source must not be among them.

    Raises:
        UsageError: the build folder holds something that no build left there, or the source.
    """
    own = [build.source, build.quantized, build.export]
    inside = [folder for folder in own if source.folder.is_relative_to(folder.resolve())]
    known = (build.root / "records").is_dir() or read_spec(build.root) is not None
    foreign = [] if known else [f for f in own if f.exists()]
    if inside or foreign:
        raise UsageError(
            f"{build.root} cannot be the build folder: {(inside + foreign)[0]} is there already "
            "and is not part of a build. Name another --build-dir."
        )


def _links_stand(build: Build, source: Source) -> bool:
    return all(
        (build.source / name).resolve() == (source.folder / name).resolve() for name in source.here
    )


def _link(build: Build, source: Source) -> None:
    for old in sorted(build.source.rglob("*"), reverse=True):
        if old.is_symlink():
            old.unlink()
    for name in source.here:
        link = build.source / name
        make_folder(link.parent)
        try:
            link.symlink_to((source.folder / name).resolve())
        except OSError as error:
            if error.errno in _NO_LINKS:
                raise AccessError(
                    f"{build.source}: the file system there has no symbolic links "
                    f"({error.strerror}), and the source is not copied. Name a --build-dir on "
                    "another one."
                ) from error
            raise
    for folder in {(build.source / name).parent for name in source.here}:
        sync_folder(folder)
