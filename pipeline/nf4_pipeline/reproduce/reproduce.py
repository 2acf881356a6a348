"""`nf4 reproduce`: manifest -> source -> derived hashes -> differences."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nf4_pipeline.calibration.calibration_facts import CALIBRATION_FILE, public_calibration
from nf4_pipeline.calibration.calibrator import Calibrator, calibration_file
from nf4_pipeline.checkpoint.source import open_checkpoint
from nf4_pipeline.documents import Document
from nf4_pipeline.engine.quantize_checkpoint import CheckpointPlanner
from nf4_pipeline.errors import ArtifactError, RecipeError
from nf4_pipeline.machine import Machine
from nf4_pipeline.manifest.artifact_files import Weights, assemble_files
from nf4_pipeline.manifest.manifest import Manifest, Source
from nf4_pipeline.manifest.read import MANIFEST_FILE, read_manifest
from nf4_pipeline.nf4.rounding import NearestOnCpu
from nf4_pipeline.processes.temporary import TemporaryFolder
from nf4_pipeline.progress import Reporter
from nf4_pipeline.recipe import Recipe, parse_recipe
from nf4_pipeline.records import DownloadFacts
from nf4_pipeline.reproduce.calibration import (
    choose_again,
    device_for,
    device_name,
    frozen_tokens,
)
from nf4_pipeline.reproduce.compare_files import Difference, compare_files
from nf4_pipeline.reproduce.derive import Derivation
from nf4_pipeline.reproduce.origin import Origin
from nf4_pipeline.reproduce.source import open_source
from nf4_pipeline.resource_usage import measured

_DOWNLOADER: Final = ".cache/huggingface/"
"""What the Hub's client leaves in a folder that it fills."""
_MACHINE: Final = Machine()


@dataclass(frozen=True, kw_only=True)
class SourceDocument(Document):
    """The source as `nf4 reproduce --json` says it; `files` is how many it has."""

    repo: str
    commit: str | None
    content_sha256: str
    files: int
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class ReproductionDocument(Document):
    """A `Reproduction` as `nf4 reproduce --json` says it."""

    reproduced: bool
    source: SourceDocument
    files: int
    equal: int
    differences: tuple[Difference, ...]
    not_derived: tuple[str, ...]
    calibrated_on: str | None
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Reproduction:
    """What came of deriving an artifact again.

    Attributes:
        source: the checkpoint, as it was found.
        origin: who confirms its repo and commit.
        files: how many files the source makes.
        differences: the files that are not what the source makes; the first one, and the first of
            the weights, say which byte.
        not_derived: files in the folder that no source makes, such as the model card.
        manifest: as the source and the recipe make it.
        facts: of the source.
        calibrated_on: the device that codes were chosen on again; None if none are calibrated.
        seconds: wall-clock time.
        peak_memory: bytes.
    """

    source: Source
    origin: Origin
    files: int
    differences: list[Difference]
    not_derived: list[str]
    manifest: Manifest
    facts: DownloadFacts
    calibrated_on: str | None
    seconds: float
    peak_memory: int

    @property
    def equal(self) -> int:
        """How many files are what the source makes."""
        return self.files - len(self.differences)

    @property
    def document(self) -> ReproductionDocument:
        """What `nf4 reproduce --json` says."""
        return ReproductionDocument(
            reproduced=not self.differences,
            source=SourceDocument(
                repo=self.source.repo,
                commit=self.source.commit,
                content_sha256=self.source.content_sha256,
                files=len(self.source.files),
                origin=self.origin,
            ),
            files=self.files,
            equal=self.equal,
            differences=tuple(self.differences),
            not_derived=tuple(self.not_derived),
            calibrated_on=self.calibrated_on,
            seconds=round(self.seconds, 3),
            peak_memory_bytes=self.peak_memory,
        )


def reproduce(
    artifact: Path,
    source: Path | None,
    reporter: Reporter,
    machine: Machine = _MACHINE,
    *,
    scratch: Path | None = None,
) -> Reproduction:
    """Derives an artifact again from its source, and compares every file.

    Calibrated codes are chosen again from the tokens that the artifact holds, on the kind of device
    on which they were chosen; all else is done on the CPU.

    Args:
        artifact: a folder with a manifest, such as a download of a published one.
        source: the folder that holds the checkpoint; None for the commit that the manifest pins.
        reporter: told how far it is.
        machine: threads, memory, and where calibrated codes are chosen; its device "auto" means
            what the manifest says.
        scratch: an empty folder for what is needed on the way; None for a temporary one.

    Raises:
        ArtifactError: there is no manifest, or not one that can be followed; or no calibration.json
            beside one that needs it.
        UsageError: the device is not of the kind on which codes were chosen.
        ResourceError: this machine has no such device, or what codes learned from cannot be had on
            it.
        SourceError: the source is not the one that the manifest pins, or not of the repo and commit
            that it names, as far as a Hub or its cache can tell.
        BuildError: the source was touched while it was read.
        HubError: the Hub does not give the source.
    """
    manifest = read_manifest(artifact)
    recipe = _recipe(manifest, artifact)
    tokens = frozen_tokens(artifact, manifest) if recipe.quantize.calibrate else None
    summary = manifest.calibration
    device = "cpu"
    if tokens is not None and summary is not None:
        device = device_for(summary, machine.device)
    with ExitStack() as stack:
        usage = stack.enter_context(measured())
        scratch = scratch or stack.enter_context(TemporaryFolder("reproduce"))
        pinned = open_source(manifest, source, scratch, reporter)
        facts = pinned.facts
        planner = CheckpointPlanner(open_checkpoint(pinned.folder), facts.model, recipe.quantize)
        choice = None
        if tokens is not None and summary is not None:
            calibrator = Calibrator(
                pinned.folder,
                facts.content_sha256,
                scratch / "calibration",
                recipe.quantize,
                device,
            )
            choice = choose_again(calibrator, planner.plan(), summary, tokens, reporter)
        derived = Derivation(
            planner,
            NearestOnCpu() if choice is None else choice.rounding(),
            frozenset() if choice is None else choice.facts.kept_modules,
            recipe.serialize.max_shard_bytes,
            machine,
        ).derive(reporter)
        calibration = None
        if choice is not None and tokens is not None:
            content = calibration_file(tokens, choice.facts)
            calibration = public_calibration(choice.facts), {CALIBRATION_FILE: content}
        files = assemble_files(
            pinned.folder,
            pinned.source,
            facts.model.class_name,
            recipe,
            Weights(derived.run.plan, derived.shards, derived.relative_rmse, calibration),
        )
        small = files.small
        listed = manifest.files
        differences = compare_files(artifact, listed, derived, small, reporter)
        pinned.inputs.check_untouched()
    made = {*derived.outputs, *small}
    return Reproduction(
        pinned.source,
        pinned.origin,
        len({*made, *listed, *(difference.file for difference in differences)}),
        differences,
        sorted(
            name
            for path in artifact.rglob("*")
            if path.is_file()
            and (name := path.relative_to(artifact).as_posix()) not in made
            and name not in listed
            and not name.endswith(".safetensors")
            and not name.startswith(_DOWNLOADER)
        ),
        files.manifest,
        facts,
        None if tokens is None else device_name(device),
        usage.seconds,
        usage.peak_memory,
    )


def _recipe(manifest: Manifest, artifact: Path) -> Recipe:
    try:
        return parse_recipe(manifest.recipe, MANIFEST_FILE)
    except RecipeError as error:
        raise ArtifactError(
            f"{artifact / MANIFEST_FILE} holds a recipe that this version cannot follow: {error}"
        ) from error
