"""Calibrated codes chosen again, from the tokens that an artifact holds.

The tokens, and which modules stay in 16 bit, are taken as they stand: that a model wrote the tokens
is not proven, only that codes and scales follow from them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nf4_pipeline.calibration.calibration_facts import CALIBRATION_FILE
from nf4_pipeline.calibration.calibrator import CalibratedChoice, Calibrator
from nf4_pipeline.checkpoint.digest import digest_file
from nf4_pipeline.checkpoint.source import read_json
from nf4_pipeline.errors import (
    ArtifactError,
    CheckpointError,
    RecipeError,
    ResourceError,
    UsageError,
)
from nf4_pipeline.manifest.manifest import CalibrationSummary, Manifest
from nf4_pipeline.manifest.read import MANIFEST_FILE
from nf4_pipeline.progress import Reporter
from nf4_pipeline.selection import Plan

if TYPE_CHECKING:
    from nf4_pipeline.calibration.tokens import CalibrationTokens


def frozen_tokens(artifact: Path, manifest: Manifest) -> CalibrationTokens:
    """The tokens that an artifact was calibrated on, held against its manifest.

    Args:
        artifact: its folder.
        manifest: its manifest, whose recipe says that it is calibrated.

    Raises:
        ArtifactError: the file that holds them is missing, or is not the one that was used.
    """
    from nf4_pipeline.calibration.tokens import parse_tokens

    listed = manifest.files.get(CALIBRATION_FILE)
    if listed is None or manifest.calibration is None:
        raise ArtifactError(
            f"{artifact / MANIFEST_FILE} says that codes are calibrated, but not from what: "
            f'expected "calibration", and {CALIBRATION_FILE} among "files". Take the manifest from '
            "where the artifact was published."
        )
    path = artifact / CALIBRATION_FILE
    if not path.is_file():
        raise ArtifactError(
            f"{artifact} has no {CALIBRATION_FILE}. Its codes are calibrated, and can be chosen "
            "again only from the tokens in that file: put it beside the manifest "
            f"({listed.size:,} bytes, sha256 {listed.sha256})."
        )
    digest = digest_file(path)
    if digest != listed:
        raise ArtifactError(
            f"{path} is not the file that the manifest lists: expected {listed.size:,} bytes "
            f"with sha256 {listed.sha256}, found {digest.size:,} bytes with sha256 "
            f"{digest.sha256}. Download it again."
        )
    try:
        tokens = parse_tokens(read_json(path))
    except (CheckpointError, RecipeError) as error:
        raise ArtifactError(f"{path} cannot be followed: {error}") from error
    expected = manifest.calibration.tokens_sha256
    if tokens.sha256 != expected:
        raise ArtifactError(
            f"{path} holds other tokens than the manifest says: expected sha256 {expected}, found "
            f"{tokens.sha256}. Download both files again."
        )
    return tokens


def device_for(calibration: CalibrationSummary, asked: str) -> str:
    """The devices on which codes are chosen again: of the kind on which they were chosen.

    Args:
        calibration: of the artifact.
        asked: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        UsageError: the device that was asked for is of another kind.
        ResourceError: this machine has no such device.
    """
    from nf4_pipeline.runtime.loader import pick_device

    kind = calibration.device
    why = (
        f'The artifact was calibrated on a device of the kind "{kind}", and calibrated bytes are '
        "the same only on the same kind"
    )
    if asked != "auto" and asked.partition(":")[0] != kind:
        raise UsageError(f"--device {asked}: {why}. Leave --device out, or say --device {kind}.")
    wanted = kind if asked == "auto" else asked
    try:
        pick_device(wanted)
        return wanted
    except ResourceError as error:
        raise ResourceError(
            f"{why}, but this machine has no device {wanted}. Run `nf4 reproduce` on a machine "
            "that has one, best of the model that made the artifact."
        ) from error


def choose_again(
    calibrator: Calibrator,
    plan: Plan,
    calibration: CalibrationSummary,
    tokens: CalibrationTokens,
    reporter: Reporter,
) -> CalibratedChoice:
    """Chooses codes and scales as the artifact's were chosen.

    Args:
        calibrator: of the source; what is chosen stands in its folder.
        plan: before modules are kept for what they lose.
        calibration: of the artifact; says which modules stay in 16 bit.
        tokens: what the model reads.
        reporter: told how far it is.

    Raises:
        ArtifactError: a module that is said to stay in 16 bit is none that could be quantized, or
            the tokens are not this model's.
        ResourceError: codes learned from a text, or the model writes other tokens on this machine
            than those that they learned from, or the device has too little memory.
    """
    learning = calibration.learning
    if learning is not None and calibration.source == "text":
        raise ResourceError(
            "The codes of this artifact learned from a text, which is not part of it, so they "
            "cannot be derived again. Whoever has the text can build it again: nf4 build "
            "--calibrate FILE --effort high."
        )
    if calibrator.recipe.effort and learning is None:
        raise ArtifactError(
            f'{MANIFEST_FILE} says that codes learned (effort "high"), but not from what: expected '
            '"learning" in "calibration". Take it from where the artifact was published.'
        )
    modules = {tensor.module for tensor in plan.quantized}
    for module in calibration.kept:
        if module.module not in modules:
            raise ArtifactError(
                f"{MANIFEST_FILE} says that {module.module!r} was left in 16 bit for what it "
                "would lose; the source has no such module to quantize."
            )
    try:
        return calibrator.choose(
            plan, tokens, reporter, kept=calibration.kept, expected_learning=learning
        )
    except RecipeError as error:
        raise ArtifactError(f"{CALIBRATION_FILE} cannot be followed: {error}") from error


def device_name(device: str) -> str:
    """What people call a device: the model of a GPU, or "cpu"."""
    import torch

    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
