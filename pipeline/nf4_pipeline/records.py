"""The records of all stages: what each leaves for the others to know. Stages read nothing else.

DOWNLOAD    what was pinned, and what transformers says of its architecture
QUANTIZE    what stands in quantized/, file by file, and how it was chosen; while only parts of it
            do, each of them has a record of its own (`part_kind`)
SERIALIZE   the totals of the artifact
VERIFY      verification.json
ATTEST      which repo the card names
PUSH        what the Hub holds, and the proof
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from nf4_pipeline.build_folder import Build, Facts, Record, RecordKind
from nf4_pipeline.calibration.calibration_facts import CalibrationFacts
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.checkpoint.files import CARD_FILE, entries
from nf4_pipeline.checkpoint.shards import TensorFacts
from nf4_pipeline.checkpoint.source_card import SourceCard, read_card
from nf4_pipeline.documents import Document, key, optional
from nf4_pipeline.engine.parts import Part
from nf4_pipeline.hub.local import Proof
from nf4_pipeline.manifest.manifest import Source, Totals
from nf4_pipeline.model.architecture import Architecture
from nf4_pipeline.model.tokenizer_facts import TokenizerFacts
from nf4_pipeline.model.unused_tensors import LeftOut
from nf4_pipeline.provenance.ci_run import CiRun
from nf4_pipeline.provenance.signing import SIGNATURE_FILE
from nf4_pipeline.provenance.summary import Rebuild
from nf4_pipeline.recipe import QuantizeRecipe, Recipe
from nf4_pipeline.verification.document import Verification, parse_verification

_PART_FILE: Final = re.compile(r"quantize\.([0-9]{1,5})-of-([0-9]{1,5})\.json")


@dataclass(frozen=True)
class Reading(Document):
    """How the tensors of a checkpoint are understood, as the user says it.

    Attributes:
        allow_unused: patterns of tensors that the model has no place for and may be left out.
        strip_prefix: what stands before the names of all tensors; a copy without it is made.
    """

    allow_unused: tuple[str, ...] = ()
    strip_prefix: str = ""

    @classmethod
    def of(cls, recipe: QuantizeRecipe) -> Reading:
        """What a recipe says of it."""
        return cls(recipe.allow_unused, recipe.strip_prefix)

    def into(self, recipe: Recipe) -> Recipe:
        """A recipe that says the same, where it does not say something else."""
        own = recipe.quantize
        return replace(
            recipe,
            quantize=replace(
                own,
                allow_unused=own.allow_unused or self.allow_unused,
                strip_prefix=own.strip_prefix or self.strip_prefix,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class SourceIdentity(Document):
    """Which checkpoint it is; the fields are those of `manifest.Source`, without its files."""

    repo: str
    commit: str | None
    content_sha256: str
    unchecked: tuple[str, ...] | None = optional()


@dataclass(frozen=True, kw_only=True)
class DownloadFacts(Document):
    """What a checkpoint is.

    Attributes:
        repo: Hub id, or the name of the local folder.
        commit: 40 hex digits for a Hub model, else None.
        content_sha256: one hash over all files.
        is_sample: it is the model that comes with the package.
        model: what transformers said of its architecture when it was downloaded.
        converted_from: the pickles that its weights were, or the files whose tensors had a prefix,
            by name; else empty.
        tokenizer: what was found of it; None in a record of an older version.
        reading: how its tensors are understood.
        unchecked: files that the Hub listed without a hash; None for none.
        card: what its own card says of license and language; None in a record of an older version.
        streamed: the files of weights that stay on the Hub, as it lists them; None if all files are
            here.
    """

    repo: str
    commit: str | None
    content_sha256: str
    is_sample: bool
    model: Architecture
    converted_from: Mapping[str, FileDigest]
    tokenizer: TokenizerFacts | None = optional()
    reading: Reading = field(default_factory=Reading)
    unchecked: tuple[str, ...] | None = optional()
    card: SourceCard | None = optional()
    streamed: Mapping[str, FileDigest] | None = optional()

    @property
    def notes(self) -> list[str]:
        """What a person should know before hours of work, and at their end."""
        odd = self.card.left_out if self.card else ()
        return [
            *(self.tokenizer.notes(self.repo) if self.tokenizer else ()),
            *(f"The card of {self.repo}: left out {what}." for what in odd),
        ]

    @property
    def identity(self) -> SourceIdentity:
        """What the manifest says of the source, but for its files."""
        return SourceIdentity(
            repo=self.repo,
            commit=self.commit,
            content_sha256=self.content_sha256,
            unchecked=self.unchecked or None,
        )

    def source(self, files: dict[str, FileDigest]) -> Source:
        """What the manifest says of the source, which holds these files."""
        return Source(
            repo=self.repo,
            commit=self.commit,
            content_sha256=self.content_sha256,
            files=files,
            unchecked=self.unchecked or None,
        )

    @property
    def pinned(self) -> str:
        """For people: the commit, or the beginning of the content hash."""
        return self.commit or f"content {self.content_sha256[:12]}"


@dataclass(frozen=True, kw_only=True)
class FileFacts(Document):
    """A finished file of quantized/; stands beside it while the others are made.

    Attributes:
        key: of what was quantized, so that no file of another run is taken for one of this.
        size: of the file, in bytes.
        sha256: of the file.
        tensors: that it holds, by name.
        relative_rmse: of each quantized weight, by name.
    """

    key: str = field(metadata=key("stage"))
    size: int
    sha256: str
    tensors: Mapping[str, TensorFacts]
    relative_rmse: Mapping[str, float]

    @property
    def digest(self) -> FileDigest:
        return FileDigest(self.size, self.sha256)


@dataclass(frozen=True, kw_only=True)
class QuantizeFacts(Document):
    """What was quantized.

    Attributes:
        predicted_bytes: of all files, known before the first was written.
        skip_modules: what readers must be told to leave alone.
        hidden_modules: quantized modules that a stock loader of transformers >= 5.5 passes over.
        untied: tied tensors that differ, so that both are kept.
        files: name in quantized/ -> its facts.
        calibration: how codes and scales were chosen; None if rounded to nearest.
        run: the CI run that it was done in; None if it was none, or nobody may know.
    """

    predicted_bytes: int
    skip_modules: tuple[str, ...]
    hidden_modules: tuple[str, ...]
    untied: tuple[str, ...] = field(metadata=key("different_twins"))
    files: Mapping[str, FileFacts]
    calibration: CalibrationFacts | None = optional()
    run: CiRun | None = optional()

    @property
    def kept_modules(self) -> frozenset[str]:
        """Modules that calibration left in 16 bit."""
        return self.calibration.kept_modules if self.calibration else frozenset()

    @property
    def relative_rmse(self) -> dict[str, float]:
        """Of each quantized weight, by name."""
        return {
            name: value
            for file in self.files.values()
            for name, value in file.relative_rmse.items()
        }


@dataclass(frozen=True, kw_only=True)
class PartFacts(Document):
    """Which part of quantized/ was made; its files are the record's outputs.

    Attributes:
        part: its number, from 1 on.
        of: how many parts there are.
        untied: as in `QuantizeFacts`.
    """

    part: int
    of: int
    untied: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SerializeFacts(Document):
    """What stands in the artifact.

    Attributes:
        totals: those of its manifest.
        hidden_modules: as in `QuantizeFacts`.
        left_out: learned tensors of the source that are not in it.
    """

    totals: Totals
    hidden_modules: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AttestFacts(Document):
    """For whom it was written.

    Attributes:
        repo_id: the Hub repo that the card names; None if it names none.
        rebuilt: the summary that the card links to; None if none is known.
    """

    repo_id: str | None = optional()
    rebuilt: Rebuild | None = optional()


@dataclass(frozen=True, kw_only=True)
class PushFacts(Document):
    """What the Hub holds, as `nf4 push --json` says it.

    Attributes:
        repo_id: ORG/NAME.
        commit: the commit that holds the files.
        url: of that commit.
        branch: main, or refs/pr/N.
        parent: the commit before it, if one was made now.
        committed: a commit was made now.
        created: the repo was made now.
        private: visibility of the repo.
        pull_request: its number, if it is one.
        pull_request_url: where it is.
        verdict: of verify.
        allow_unverified: the verdict is not "pass", and the card says so.
        files: name -> digest of each file that is there.
        total_bytes: of these files.
        proof: what the Hub lists for each file beside what was expected.
    """

    repo_id: str
    commit: str
    url: str
    branch: str
    parent: str | None
    committed: bool
    created: bool
    private: bool
    pull_request: int | None
    pull_request_url: str | None
    verdict: str
    allow_unverified: bool
    files: Mapping[str, FileDigest]
    total_bytes: int
    proof: Proof


DOWNLOAD: Final = RecordKind("download", DownloadFacts.from_json)
QUANTIZE: Final = RecordKind("quantize", QuantizeFacts.from_json)
SERIALIZE: Final = RecordKind("serialize", SerializeFacts.from_json)
VERIFY: Final[RecordKind[Verification]] = RecordKind("verify", parse_verification)
ATTEST: Final = RecordKind("attest", AttestFacts.from_json)
PUSH: Final = RecordKind("push", PushFacts.from_json)

_ALL: Final[tuple[RecordKind[Facts], ...]] = (
    DOWNLOAD,
    QUANTIZE,
    SERIALIZE,
    VERIFY,
    ATTEST,
    PUSH,
)
KINDS: Final[dict[str, RecordKind[Facts]]] = {kind.stage: kind for kind in _ALL}
"""By the stage's name, in the order of the stages."""


def source_files(record: Record[DownloadFacts]) -> dict[str, FileDigest]:
    """The files of a source, by name: those that are here, and those that stay on the Hub."""
    return dict(sorted((record.outputs_in("source") | dict(record.facts.streamed or {})).items()))


def recorded_files(build: Build) -> dict[str, FileDigest]:
    """What the stages say that they left in the export, by its path there."""
    files: dict[str, FileDigest] = {}
    for kind in KINDS.values():
        record = build.record(kind)
        files |= record.outputs_in("export") if record else {}
    return files


def source_card(build: Build) -> SourceCard:
    """What the card of the source says, as it was read when the source was downloaded."""
    said = build.need(DOWNLOAD).facts.card
    return said if said is not None else read_card(build.source / CARD_FILE)


def strangers(build: Build) -> list[str]:
    """What lies in the export and no stage left there, but for a signature, sorted."""
    known = {*recorded_files(build), SIGNATURE_FILE}
    return sorted(entries(build.export).keys() - known)


def part_kind(part: Part) -> RecordKind[PartFacts]:
    """Of the record that a part leaves."""
    return RecordKind(
        f"quantize --part {part}", PartFacts.from_json, f"quantize.{part.number}-of-{part.of}"
    )


def part_records(build: Build) -> dict[Part, Record[PartFacts]]:
    """The partial records that stand in a build, in their order."""
    found = {}
    for path in (build.root / "records").glob("quantize.*-of-*.json"):
        if name := _PART_FILE.fullmatch(path.name):
            part = Part(int(name[2]), int(name[1]))
            if (record := build.record(part_kind(part))) is not None:
                found[part] = record
    return dict(sorted(found.items()))


def forget_parts(build: Build) -> None:
    """Deletes partial records: the whole one stands."""
    for part in part_records(build):
        build.forget(part_kind(part))
