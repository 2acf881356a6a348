"""The weights of a build that stay on the Hub: planned by their headers, passed by, served.

streamed/headers/<file>.header    the first bytes of each file of weights
streamed/passed/<file>.json       what is known of a file that has passed by once, whole
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.atomic import make_folder, write_json
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.checkpoint.plain_file import read_plain
from nf4_pipeline.checkpoint.skeleton import make_skeleton
from nf4_pipeline.checkpoint.source import Checkpoint, SourceTensor, open_checkpoint
from nf4_pipeline.engine.quantize_checkpoint import QuantizationRun
from nf4_pipeline.engine.scheduler import Opener, Output, QuantizedFile
from nf4_pipeline.errors import CheckpointError, HubError, TiedWeightsDiffer, UsageError
from nf4_pipeline.hub import RemoteFile, RemoteModel, read_range
from nf4_pipeline.processes.temporary import TemporaryFolder
from nf4_pipeline.progress import Reporter, Task
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import DOWNLOAD
from nf4_pipeline.selection import Plan
from nf4_pipeline.streaming.passing import Passing, Span
from nf4_pipeline.streaming.serving import Stretches, serving
from nf4_pipeline.streaming.stretches import Fetch, PassedFile

_FOLDER: Final = "streamed"
_LARGEST: Final = 64 * 2**20  # bytes of what is kept of one file


def header_path(file: str) -> str:
    """Where the header of a file of weights is kept, in the build folder."""
    return f"{_FOLDER}/headers/{file}.header"


def check_streamable(recipe: Recipe) -> None:
    """Refuses a recipe that reads the weights more than once.

    Raises:
        UsageError: the recipe is a calibrated one.
    """
    if recipe.quantize.calibrate:
        raise UsageError(
            "--stream-source: calibration walks through the whole model several times, and each "
            "walk would fetch it again. Leave --calibrate out, or --stream-source."
        )


def open_source(build: Build) -> Checkpoint:
    """The source of a build, by its headers, wherever its weights are.

    Raises:
        BuildError: download is not done.
        SourceError: the checkpoint cannot be read.
    """
    if not build.need(DOWNLOAD).facts.streamed:
        return open_checkpoint(build.source)
    with TemporaryFolder("stream") as folder:
        _make_headers(build, folder)
        return replace(open_checkpoint(folder), folder=build.source)


def _make_headers(build: Build, folder: Path) -> None:
    """Fills a folder with the source's small files, and with headers in place of its weights."""
    record = build.need(DOWNLOAD)
    weights = {
        name: ((build.root / header_path(name)).read_bytes(), digest.size)
        for name, digest in (record.facts.streamed or {}).items()
    }
    make_skeleton(folder, build.source, record.outputs_in("source"), weights)


@dataclass(frozen=True)
class StreamedSource:
    """The files of weights that stay on the Hub.

    Attributes:
        build: the build folder.
        model: their repo at the pinned commit, with these files alone.
        reporter: told how far it is.
    """

    build: Build
    model: RemoteModel
    reporter: Reporter

    @classmethod
    def of(cls, build: Build, reporter: Reporter) -> StreamedSource | None:
        """That of a build; None if its source is here.

        Raises:
            BuildError: download is not done.
        """
        facts = build.need(DOWNLOAD).facts
        if not facts.streamed or facts.commit is None:
            return None
        files = tuple(RemoteFile(n, d.size, d.sha256, None) for n, d in facts.streamed.items())
        return cls(build, RemoteModel(facts.repo, facts.commit, files, facts.commit), reporter)

    def passed(self, file: str) -> PassedFile | None:
        """What is known of a file that passed by whole; None if it did not."""
        path = self._passed_path(file)
        try:
            passed = PassedFile.from_json(json.loads(read_plain(path, _LARGEST)))
        except (OSError, ValueError, RecursionError):
            return None
        listed = self._listed(file)
        return passed if FileDigest(passed.size, passed.sha256) == listed else None

    def check_tied(self, plan: Plan) -> None:
        """Holds tensors that are to be dropped against those they are tied to, by their hashes.

        Files of which nothing is known yet are passed over.

        Raises:
            TiedWeightsDiffer: two of them differ in dtype, shape or content.
        """
        tied = {tensor.source.name: tensor.source for tensor in plan.tensors}
        for tensor in plan.by_action("drop"):
            if tensor.tied_to is None:
                continue
            pair = tensor.source, tied[tensor.tied_to]
            kinds = {(one.header.dtype, one.header.shape) for one in pair}
            known = [self.passed(one.file) for one in pair]
            hashes = {
                passed.tensors[one.name]
                for one, passed in zip(pair, known, strict=True)
                if passed is not None and one.name in passed.tensors
            }
            if len(kinds) > 1 or len(hashes) > 1:
                raise TiedWeightsDiffer(tensor.source.name)

    def missing(self, plan: Plan | None) -> list[str]:
        """The files of which not all is known that later work needs."""
        tied = _tied(plan)
        missing = []
        for file in (file.path for file in self.model.files):
            passed = self.passed(file)
            if passed is None or tied.get(file, set()) - passed.tensors.keys():
                missing.append(file)
        return missing

    def pass_by(
        self,
        file: str,
        plan: Plan | None,
        wanted: Sequence[SourceTensor] = (),
        work: Callable[[Passing], None] = lambda passing: None,
    ) -> None:
        """Has all of a file pass by, while something is made of it; ends when its hash agrees.

        What was made counts only then. If other bytes came than the Hub lists, it is done once
        more, from the beginning.

        Args:
            file: its name.
            plan: that says which tensors are tied; None if nobody wants to know.
            wanted: the tensors that `work` reads, each of them once.
            work: is called once or twice. What it raises of the checkpoint's bytes is raised here
                when it is known that these are the bytes of the file.

        Raises:
            HubError: the Hub refuses the file, does not answer, or sent wrong bytes twice; or its
                header is not the one that was planned by.
            CheckpointError: what `work` raised.
        """
        header = (self.build.root / header_path(file)).read_bytes()
        held = [t.header for t in open_source(self.build).tensors_in(file)]
        named = [tensor for tensor in held if tensor.name in _tied(plan).get(file, set())]
        listed, failure = self._listed(file), None
        for last in (False, True):
            with Passing.whole(
                file,
                listed.size,
                header,
                held,
                _spans(wanted),
                self._fetch(),
                self.reporter,
                named,
            ) as passing:
                try:
                    if as_planned := passing.begins_as_planned():
                        work(passing)
                except CheckpointError as error:  # of the file, or of bytes that came wrong
                    failure = error
                passed = passing.finish()
            if FileDigest(passed.size, passed.sha256) == listed:
                break
            wrong = f"expected sha256 {listed.sha256}, got {passed.sha256}"
            if last:
                raise HubError(
                    f"{file} of {self.model.repo_id}@{self.model.commit[:12]} came wrong twice: "
                    f"{wrong}. Nothing that was made of it is kept. Look for a proxy or mirror "
                    "that alters files, or try later."
                )
            self.reporter.note(f"{file}: {wrong}; fetching it again")
            failure = None
        if not as_planned:
            self._refuse_header(file)
        make_folder(self._passed_path(file).parent)
        write_json(self._passed_path(file), passed.to_json())
        if failure is not None:
            raise failure

    def make_again(
        self,
        run: QuantizationRun,
        output: Output,
        opener: Opener,
        done: Callable[[str, QuantizedFile], None],
        task: Task,
    ) -> None:
        """Makes a file of a file of the source that has passed by; what comes has known hashes.

        Args:
            run: the engine.
            output: the file.
            opener: as for the engine, like `done` and `task`.

        Raises:
            HubError: the Hub refuses, does not answer, or gave other bytes twice.
            CheckpointError: a weight holds an infinity or a NaN.
        """
        file, spans = output.source, _spans([tensor.source for tensor in output.tensors])
        with Passing.known(file, self._known(file), spans, self._fetch(), self.reporter) as passing:
            run.make_within(task, [output], opener, done, passing)

    @contextmanager
    def served(self) -> Iterator[tuple[Path, Path]]:
        """A folder with headers in place of weights, and the socket where their bytes are served.

        What passed by is served by stretches of known hashes; a file of which nothing is known
        passes by first.

        Raises:
            HubError: the Hub refuses a file, does not answer, or sends wrong bytes.
        """
        if missing := self.missing(None):
            total = sum(self._listed(file).size for file in missing)
            with self.reporter.task("hash source", total) as task:
                for file in missing:
                    self.pass_by(file, None)
                    task.advance(self._listed(file).size)
        files = {file.path: self._known(file.path) for file in self.model.files}
        with TemporaryFolder("stream") as folder:
            _make_headers(self.build, folder)
            socket = folder / "source.sock"
            with serving(Stretches(files, self._fetch()), socket):
                yield folder, socket

    def _fetch(self) -> Fetch:
        files = {file.path: file for file in self.model.files}

        def fetch(file: str, start: int, end: int) -> bytes:
            doing = f"streaming {file}"
            return read_range(self.model, files[file], start, end, doing, time.sleep)

        return fetch

    def _known(self, file: str) -> PassedFile:
        passed = self.passed(file)
        assert passed is not None  # it has passed by
        return passed

    def _listed(self, file: str) -> FileDigest:
        found = next(one for one in self.model.files if one.path == file)
        return FileDigest(found.size, found.sha256 or "")

    def _passed_path(self, file: str) -> Path:
        return self.build.root / _FOLDER / "passed" / f"{file}.json"

    def _refuse_header(self, file: str) -> None:
        """Refuses a file that does not begin as it did when the work was planned.

        These first bytes had no hash then; those of the file have.
        """
        self.build.forget(DOWNLOAD)
        raise HubError(
            f"{file} of {self.model.repo_id}@{self.model.commit[:12]} begins with another "
            "header than the one that the Hub sent when the work was planned; that one was "
            "wrong. Run the same command again: it asks for the headers anew."
        )


def _spans(tensors: Sequence[SourceTensor]) -> list[Span]:
    """Where tensors begin and end in their file."""
    places = [tensor.header for tensor in tensors]
    return [(place.offset, place.offset + place.nbytes) for place in places]


def _tied(plan: Plan | None) -> Mapping[str, set[str]]:
    """The tensors that are tied to another one, or others to them, by file."""
    found: dict[str, set[str]] = {}
    if plan is None:
        return found
    sources = {tensor.source.name: tensor.source for tensor in plan.tensors}
    for tensor in plan.by_action("drop"):
        if tensor.tied_to is not None:
            for one in (tensor.source, sources[tensor.tied_to]):
                found.setdefault(one.file, set()).add(one.name)
    return found
