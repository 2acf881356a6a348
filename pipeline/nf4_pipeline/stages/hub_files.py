"""A model of the Hub, looked at before its weights are fetched, then fetched and hashed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from nf4_pipeline.checkpoint.digest import FileDigest, FileStamp
from nf4_pipeline.checkpoint.source import read_json
from nf4_pipeline.checkpoint.weight_files import choose_weight_files
from nf4_pipeline.errors import SourceError
from nf4_pipeline.hub.remote import RemoteFile, RemoteModel
from nf4_pipeline.model.config import read_config
from nf4_pipeline.progress import LOADING, Reporter
from nf4_pipeline.records import Reading
from nf4_pipeline.stages.preflight import Findings, check_small_files, look, look_ahead

LOOK: Final = f"{LOADING}, probe the model"
"""The title of a task: transformers builds it without weights, and loads its tokenizer."""


@dataclass(frozen=True)
class SeenOnHub:
    """What is known of a Hub model before its weights are fetched.

    Attributes:
        parts: its files of weights.
        starts: the first bytes of each, with its header; empty if they are all there.
        found: what transformers says of its model.
        more: names of files that its tokenizer's class asks for beside the usual ones.
        index: the file that names the files of weights, if one does.
    """

    parts: tuple[RemoteFile, ...]
    starts: Mapping[str, bytes]
    found: Findings
    more: frozenset[str]
    index: str | None


@dataclass
class HubFiles:
    """The files of a Hub model, as far as they were fetched and hashed.

    Attributes:
        model: what the Hub lists.
        reading: how its tensors are understood.
        allow_pickle: its weights may be pickles.
        allow_unhashed: files for which the Hub lists no hash are taken, too.
        reporter: told what is done.
        folder: where its files are in the Hub cache, once something was fetched.
        digests: of each file that was fetched, by name.
        stamps: of these files, from before they were hashed, with all links followed.
        unchecked: those for which the Hub lists no hash.
    """

    model: RemoteModel
    reading: Reading
    allow_pickle: bool
    allow_unhashed: bool
    reporter: Reporter
    folder: Path = field(default_factory=Path, init=False)
    digests: dict[str, FileDigest] = field(default_factory=dict, init=False)
    stamps: dict[Path, FileStamp] = field(default_factory=dict, init=False)
    unchecked: set[str] = field(default_factory=set, init=False)

    def fetch(self, wanted: Iterable[RemoteFile], *, last: bool = False) -> None:
        """Fetches and hashes files; those that are there are hashed alone.

        Args:
            wanted: which.
            last: nothing more of this model is needed.

        Raises:
            HubError: the Hub refuses a file, does not answer, or sends wrong bytes.
        """
        from nf4_pipeline import hub

        new = tuple(file for file in wanted if file.path not in self.digests)
        fetched = hub.fetch(
            self.model,
            new,
            self.reporter,
            allow_unhashed=self.allow_unhashed,
            last=last,
        )
        self.unchecked.update(fetched.unchecked)
        self.folder = fetched.folder
        for name, sha256 in fetched.sha256.items():
            stamp = fetched.stamps[name]
            self.digests[name] = FileDigest(stamp.size, sha256)
            self.stamps[(fetched.folder / name).resolve()] = stamp

    def fetch_whole(self) -> None:
        """Fetches all that is wanted of it."""
        from nf4_pipeline import hub

        self.fetch(hub.wanted_files(self.model, allow_pickle=self.allow_pickle), last=True)

    def look(self, *, claimed: bool = True) -> SeenOnHub | None:
        """Looks at it by its small files and the headers of its weights.

        Args:
            claimed: weights that are all there are hashed before they are looked at.

        Returns:
            None if its weights are pickles, of which nothing is known before they are read.

        Raises:
            SourceError: the checkpoint is not usable.
            HubError: the Hub refuses a file, does not answer, or sends wrong bytes.
        """
        from nf4_pipeline import hub

        model = self.model
        hub.wanted_files(model, allow_pickle=self.allow_pickle)  # refuses what has no weights
        self.fetch(hub.small_files(model))
        if read_config(self.folder).get("quantization_config"):
            self.fetch(hub.named(model, ["manifest.json"]))  # of an artifact: what it was made from
        check_small_files(self.folder, model)
        weights = choose_weight_files(
            {file.path for file in model.files if "/" not in file.path},
            read_config(self.folder),
            lambda name: read_json(self.folder / name),
            f"{model.repo_id}@{model.commit[:12]}",
        )
        if weights is None:
            return None
        parts = hub.named(model, weights.files)
        if model.offline or all((self.folder / part.path).is_file() for part in parts):
            if claimed:
                self.fetch(parts)
            return self._seen(parts, {}, weights.index)
        starts = self._headers(parts)
        try:
            return self._seen(parts, starts, weights.index)
        except SourceError:
            # These bytes are of no hash; what was wrong with them may have come on their way.
            first, starts = starts, self._headers(parts)
            if starts == first:
                raise
            return self._seen(parts, starts, weights.index)

    def _headers(self, parts: Sequence[RemoteFile]) -> dict[str, bytes]:
        from nf4_pipeline import hub

        with self.reporter.task("fetch headers", None):
            return hub.fetch_headers(self.model, parts)

    def _seen(
        self, parts: Sequence[RemoteFile], starts: Mapping[str, bytes], index: str | None
    ) -> SeenOnHub:
        """What `look` finds, with all files that the tokenizer asks for."""
        from nf4_pipeline import hub

        found = self._findings(parts, starts)
        asked = hub.named(self.model, found.tokenizer.asked)
        more = [file for file in asked if file.path not in self.digests]
        if more:
            self.fetch(more)
            found = self._findings(parts, starts)
        found.tokenizer.check()
        return SeenOnHub(tuple(parts), starts, found, frozenset(file.path for file in more), index)

    def _findings(self, parts: Sequence[RemoteFile], starts: Mapping[str, bytes]) -> Findings:
        with self.reporter.task(LOOK, None):
            if not starts:
                return look(self.folder, self.reading)
            holes = {part.path: (starts[part.path], part.size) for part in parts}
            return look_ahead(self.folder, self.digests, holes, self.reading)
