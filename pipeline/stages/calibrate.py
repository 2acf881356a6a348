"""The part of quantizing that comes first if codes are to be calibrated: tokens, then choices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipeline.build import Build, stage_key
from pipeline.checkpoint.digest import digest_file
from pipeline.checkpoint.durable import make_folder, write_json
from pipeline.errors import RecipeError
from pipeline.progress import Reporter
from pipeline.recipe import QuantizeRecipe

if TYPE_CHECKING:
    from pipeline.calibration.tokens import CalibrationTokens

CODE_VERSION: Final = 1
TOKENS_FILE: Final = "tokens.json"


def tokens_path(build: Build) -> Path:
    """Where the tokens of a build are kept."""
    return build.root / "calibration" / TOKENS_FILE


def tokens_key(build: Build, recipe: QuantizeRecipe) -> str:
    """Depends on the source, on what is read, and on how much of it.

    Raises:
        RecipeError: the text cannot be read.
    """
    text = None
    if recipe.calibrate != "self":
        path = Path(recipe.calibrate)
        if not path.is_file():
            raise RecipeError(f"The calibration text {path} cannot be read: there is no such file.")
        text = digest_file(path).sha256
    return stage_key(
        {
            "code": CODE_VERSION,
            "source": build.need("download").facts["content_sha256"],
            "text": text,
            "tokens": recipe.calibration_tokens,
        }
    )


def tokens_for(
    build: Build, recipe: QuantizeRecipe, device: str, reporter: Reporter
) -> CalibrationTokens:
    """The tokens that calibration reads: those that are kept, or new ones.

    Raises:
        RecipeError: a text cannot be read, or is too short.
    """
    from pipeline.calibration.sampling import make_tokens
    from pipeline.calibration.tokens import read_tokens

    key = tokens_key(build, recipe)
    kept = read_tokens(tokens_path(build))
    if kept is not None and kept.key == key:
        return kept
    tokens = make_tokens(
        build.source,
        None if recipe.calibrate == "self" else Path(recipe.calibrate),
        recipe.calibration_tokens,
        key,
        device,
        reporter,
    )
    make_folder(tokens_path(build).parent)
    write_json(tokens_path(build), tokens.as_json())
    return tokens
