"""The files of an artifact beside its weights, the manifest among them, put together. Pure but for
reading the small files of the source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nf4_pipeline.checkpoint.atomic import json_bytes
from nf4_pipeline.checkpoint.digest import FileDigest
from nf4_pipeline.checkpoint.shards import Shard
from nf4_pipeline.checkpoint.weight_files import INDEX_FILE
from nf4_pipeline.manifest.assemble import build_manifest
from nf4_pipeline.manifest.manifest import CalibrationSummary, Manifest, Source
from nf4_pipeline.manifest.read import MANIFEST_FILE
from nf4_pipeline.manifest.small_files import small_files, stored_tensors_of, weight_index
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.selection import Plan


@dataclass(frozen=True)
class Weights:
    """The weights of an artifact.

    Attributes:
        plan: what happened to each tensor.
        shards: the weight files, in their order.
        relative_rmse: of each quantized weight, by name.
        calibration: what the manifest says of how codes and scales were chosen, and the file that
            holds the tokens (its name and content); None if they were rounded to nearest.
    """

    plan: Plan
    shards: Sequence[Shard]
    relative_rmse: Mapping[str, float]
    calibration: tuple[CalibrationSummary, dict[str, bytes]] | None = None


@dataclass(frozen=True)
class ArtifactFiles:
    """The files of an artifact beside its weights.

    Attributes:
        small: name -> content of every file but the weights, manifest.json included.
        digests: of all files of the artifact, weights and manifest included.
        manifest: what manifest.json holds.
    """

    small: dict[str, bytes]
    digests: dict[str, FileDigest]
    manifest: Manifest


def assemble_files(
    folder: Path, source: Source, model_class: str, recipe: Recipe, weights: Weights
) -> ArtifactFiles:
    """Puts together everything beside the weights.

    Args:
        folder: of the checkpoint that the artifact is made from.
        source: what the manifest says of that checkpoint.
        model_class: the causal LM class.
        recipe: what was asked for; the part that shapes the artifact goes into the manifest.
        weights: as they were written, or as they would be.
    """
    small = small_files(folder, source.files, weights.plan, model_class)
    if len(weights.shards) > 1:
        small[INDEX_FILE] = json_bytes(weight_index(weights.shards).to_json())
    calibration = None
    if weights.calibration is not None:
        calibration, tokens = weights.calibration
        small |= tokens
    digests = {shard.name: shard.digest for shard in weights.shards}
    digests |= {name: FileDigest.of(content) for name, content in small.items()}
    manifest = build_manifest(
        source=source,
        recipe=recipe,
        plan=weights.plan,
        stored=stored_tensors_of(weights.shards),
        relative_rmse=weights.relative_rmse,
        files=digests,
        model_class=model_class,
        calibration=calibration,
    )
    small[MANIFEST_FILE] = json_bytes(manifest.to_json())
    digests[MANIFEST_FILE] = FileDigest.of(small[MANIFEST_FILE])
    return ArtifactFiles(small, digests, manifest)
