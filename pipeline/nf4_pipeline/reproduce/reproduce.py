"""`nf4 reproduce`: manifest -> source -> derived hashes -> differences."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.atomic import json_bytes
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.checkpoint.weight_files import INDEX_FILE
from nf4_pipeline.errors import ArtifactError, RecipeError
from nf4_pipeline.manifest.assemble import build_manifest
from nf4_pipeline.manifest.read import MANIFEST_FILE, read_manifest
from nf4_pipeline.manifest.small_files import small_files, stored_tensors_of, weight_index
from nf4_pipeline.progress import Reporter
from nf4_pipeline.recipe import Recipe, parse_recipe
from nf4_pipeline.reproduce.calibration import choose_again, device_for, frozen_tokens, name_of
from nf4_pipeline.reproduce.compare import Difference, compare_files
from nf4_pipeline.reproduce.derive import Derived, derive
from nf4_pipeline.reproduce.source import open_source
from nf4_pipeline.resource_usage import measured
from nf4_pipeline.stages import Settings
from nf4_pipeline.stages.calibrate import CALIBRATION_FILE, Calibration, as_file
from nf4_pipeline.stages.download import recorded_facts

if TYPE_CHECKING:
    from nf4_pipeline.calibration.tokens import CalibrationTokens


@dataclass(frozen=True)
class Reproduction:
    """What came of deriving an artifact again.

    Attributes:
        source: repo, commit and content hash of the checkpoint.
        files: how many files the source makes.
        differences: the files that are not what the source makes; the first one says which byte.
        not_derived: files in the folder that no source makes, such as the model card.
        calibrated_on: the device that codes were chosen on again; None if none are calibrated.
        seconds: wall-clock time.
        peak_memory: bytes.
    """

    source: dict[str, Any]
    files: int
    differences: list[Difference]
    not_derived: list[str]
    calibrated_on: str | None
    seconds: float
    peak_memory: int

    @property
    def equal(self) -> int:
        """How many files are what the source makes."""
        return self.files - len(self.differences)

    def as_json(self) -> dict[str, Any]:
        return {
            "reproduced": not self.differences,
            "source": self.source,
            "files": self.files,
            "equal": self.equal,
            "differences": [difference.as_json() for difference in self.differences],
            "not_derived": self.not_derived,
            "calibrated_on": self.calibrated_on,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory,
        }


def reproduce(
    artifact: Path,
    source: Path | None,
    reporter: Reporter,
    *,
    device: str = "auto",
    workers: int = 0,
    memory_budget: int = Settings.memory_budget,
) -> Reproduction:
    """Derives an artifact again from its source, and compares every file.

    Calibrated codes are chosen again from the tokens that the artifact holds, on the kind of device
    on which they were chosen; all else is done on the CPU.

    Args:
        artifact: a folder with a manifest, such as a download of a published one.
        source: the folder that holds the checkpoint; None for the commit that the manifest pins.
        reporter: told how far it is.
        device: where calibrated codes are chosen: "cpu", "cuda", "cuda:N", or "auto" for what the
            manifest says.
        workers: threads; 0 for as many as keep the processors busy.
        memory_budget: bytes for all buffers of the engine together.

    Raises:
        ArtifactError: there is no manifest, or not one that can be followed; or no calibration.json
            beside one that needs it.
        UsageError: the device is not of the kind on which codes were chosen.
        ResourceError: this machine has no such device.
        SourceError: the source is not the one that the manifest pins.
        HubError: the Hub does not give it.
    """
    manifest = read_manifest(artifact)
    recipe = _recipe(manifest, artifact)
    tokens = frozen_tokens(artifact, manifest) if recipe.quantize.calibrate else None
    settings = Settings(
        recipe=recipe,
        device="cpu" if tokens is None else device_for(manifest, device),
        workers=workers,
        memory_budget=memory_budget,
    )
    with measured() as usage, tempfile.TemporaryDirectory(prefix="nf4-reproduce-") as scratch:
        build = open_source(manifest, source, Path(scratch), reporter)
        chosen = None
        if tokens is not None:
            chosen = choose_again(build, manifest, tokens, settings, reporter)
        derived = derive(build, settings, reporter, chosen)
        small = _small(build, manifest, derived, settings, chosen, tokens)
        listed = manifest["files"]
        differences = compare_files(artifact, listed, derived, small, settings, reporter)
    made = {*derived.outputs, *small}
    return Reproduction(
        {name: manifest["source"][name] for name in ("repo", "commit", "content_sha256")},
        len({*made, *listed, *(difference.file for difference in differences)}),
        differences,
        sorted(
            name
            for path in artifact.rglob("*")
            if path.is_file()
            and (name := path.relative_to(artifact).as_posix()) not in made
            and name not in listed
            and not name.endswith(".safetensors")
        ),
        None if tokens is None else name_of(settings.device),
        usage.seconds,
        usage.peak_memory,
    )


def _recipe(manifest: dict[str, Any], artifact: Path) -> Recipe:
    try:
        return parse_recipe(manifest["recipe"], MANIFEST_FILE)
    except RecipeError as error:
        raise ArtifactError(
            f"{artifact / MANIFEST_FILE} holds a recipe that this version cannot follow: {error}"
        ) from error


def _small(
    build: Build,
    manifest: dict[str, Any],
    derived: Derived,
    settings: Settings,
    chosen: Calibration | None,
    tokens: CalibrationTokens | None,
) -> dict[str, bytes]:
    """Every file beside the weights, the manifest included."""
    model_class = recorded_facts(build.need("download")).class_name
    pinned = {
        name: FileDigest(entry["size"], entry["sha256"])
        for name, entry in manifest["source"]["files"].items()
    }
    shards = derived.shards
    small = small_files(build.source, pinned, derived.plan, model_class)
    if len(shards) > 1:
        small[INDEX_FILE] = json_bytes(weight_index(shards))
    if chosen is not None and tokens is not None:
        small[CALIBRATION_FILE] = as_file(tokens, chosen.kept)
    files = {name: FileDigest.of(content) for name, content in small.items()}
    files |= {shard.name: shard.digest for shard in shards}
    again = build_manifest(
        source={name: manifest["source"][name] for name in ("repo", "commit", "content_sha256")},
        source_files=pinned,
        recipe=settings.recipe,
        plan=derived.plan,
        stored=stored_tensors_of(shards),
        relative_rmse=derived.relative_rmse,
        files=files,
        model_class=model_class,
        calibration=None if chosen is None else chosen.facts,
    )
    return {**small, MANIFEST_FILE: json_bytes(again)}
