"""The part of quantizing that comes first if codes are to be calibrated: tokens, then choices.

What it leaves in `calibration/` of the build folder: the tokens, which are part of the key of what
is quantized; and while it runs, what is chosen, block by block.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nf4_pipeline.build_folder import Build
from nf4_pipeline.checkpoint.atomic import json_bytes, make_folder, write_json
from nf4_pipeline.checkpoint.digest import digest_file, json_sha256
from nf4_pipeline.errors import BuildError, PlanMismatchError, RecipeError, ResourceError
from nf4_pipeline.nf4.rounding import NearestOnCpu, Rounding
from nf4_pipeline.progress import Reporter
from nf4_pipeline.recipe import QuantizeRecipe
from nf4_pipeline.resource_usage import DeviceUsage, measured_on_device
from nf4_pipeline.selection import Plan
from nf4_pipeline.stages import Settings

if TYPE_CHECKING:
    from nf4_pipeline.calibration.block_store import Store
    from nf4_pipeline.calibration.tokens import CalibrationTokens

CODE_VERSION: Final = 1
TOKENS_FILE: Final = "tokens.json"
CALIBRATION_FILE: Final = "calibration.json"
"""In the artifact."""


@dataclass(frozen=True)
class Calibration:
    """What was chosen.

    Attributes:
        files: name of a weight -> the file that holds its codes and scales.
        kept: modules that stay in 16 bit under the byte budget, with what they lose by 4 bits (KL,
            nats per token) and what they cost (bytes).
        facts: for the record and the manifest; plain JSON.
        identity: of all that was chosen from; the same gives the same bytes.
    """

    files: dict[str, Path]
    kept: list[dict[str, Any]]
    facts: dict[str, Any]
    identity: str

    def rounding(self) -> Rounding:
        """The choices, for the engine; weights without one are rounded to nearest."""
        from nf4_pipeline.gptq.precomputed import Given

        return Given(self.files, NearestOnCpu())


def folder(build: Build) -> Path:
    """Where the tokens of a build are kept, and its choices."""
    return build.root / "calibration"


def tokens_path(build: Build) -> Path:
    """Where the tokens of a build are kept."""
    return folder(build) / TOKENS_FILE


def key_part(build: Build, recipe: QuantizeRecipe) -> dict[str, Any]:
    """What calibration adds to the key of what is quantized; without tokens nothing is done yet."""
    from nf4_pipeline.calibration.tokens import read_tokens

    kept = read_tokens(tokens_path(build))
    fits = kept is not None and kept.key == tokens_key(build, recipe)
    return {"code": CODE_VERSION, "tokens": kept.sha256 if kept is not None and fits else None}


def text_path(recipe: QuantizeRecipe) -> Path | None:
    """The text to calibrate on; None if there is none.

    Raises:
        RecipeError: there should be one.
    """
    if recipe.calibrate in ("", "self"):
        return None
    path = Path(recipe.calibrate)
    if not path.is_file():
        raise RecipeError(
            f"The calibration text {path} cannot be read: there is no such file. "
            'Name another, or "self" for tokens that the model writes.'
        )
    return path


def tokens_key(build: Build, recipe: QuantizeRecipe) -> str:
    """Depends on the source, on what is read, and on how much of it.

    Raises:
        RecipeError: the text cannot be read.
    """
    from nf4_pipeline.calibration.tokens import OPENINGS

    path = text_path(recipe)
    text = None if path is None else digest_file(path).sha256
    return json_sha256(
        {
            "code": CODE_VERSION,
            "source": build.need("download").facts["content_sha256"],
            "text": text,
            "tokens": recipe.calibration_tokens,
            "openings": digest_file(OPENINGS).sha256 if path is None else None,
        }
    )


def tokens_for(build: Build, settings: Settings, reporter: Reporter) -> CalibrationTokens:
    """The tokens that calibration reads: those that are kept, or new ones.

    Raises:
        RecipeError: a text cannot be read, or is too short.
    """
    from nf4_pipeline.calibration.sampling import make_tokens
    from nf4_pipeline.calibration.tokens import read_tokens
    from nf4_pipeline.runtime.loader import pick_device

    recipe = settings.recipe.quantize
    key = tokens_key(build, recipe)
    kept = read_tokens(tokens_path(build))
    if kept is not None and kept.key == key:
        return kept
    device = pick_device(settings.device)
    with enough_memory(device):
        tokens = make_tokens(
            build.source,
            text_path(recipe),
            recipe.calibration_tokens,
            key,
            device,
            reporter,
        )
    make_folder(tokens_path(build).parent)
    write_json(tokens_path(build), tokens.as_json())
    return tokens


def choose(
    build: Build,
    plan: Plan,
    tokens: CalibrationTokens,
    settings: Settings,
    reporter: Reporter,
    *,
    already_kept: list[dict[str, Any]] | None = None,
    sampling: DeviceUsage | None = None,
) -> Calibration:
    """Chooses codes and scales for everything that the plan quantizes, or goes on doing so.

    Args:
        build: whose download is done.
        plan: of the build, before modules are kept for what they lose.
        tokens: what the model reads.
        settings: the device, and how much larger the artifact may be for modules kept in 16 bit.
        reporter: told how far it is, and of weights that are rounded to nearest after all.
        already_kept: modules that are known to be kept (see `Calibration.kept`); None to find them.
        sampling: what finding the tokens took, for the record.
    """
    from nf4_pipeline.calibration.block_store import Store
    from nf4_pipeline.calibration.calibration_pass import calibrate
    from nf4_pipeline.runtime.loader import pick_device

    device = pick_device(settings.device)
    kind = device.partition(":")[0]
    source = build.need("download").facts["content_sha256"]
    identity = {
        "code": CODE_VERSION,
        "source": source,
        "tokens": tokens.sha256,
        "device": kind,
        "torch": version("torch"),  # what it computes may change with it
        "weights": [tensor.name for tensor in plan.quantized],
    }
    store = Store(folder(build) / json_sha256(identity)[:12])
    store.open()
    with enough_memory(device), measured_on_device() as passing:
        parts = calibrate(
            build.source, plan.quantized, tokens, store, device=device, reporter=reporter
        )
    fallbacks = store.fallbacks()
    lost = {tensor.name for tensor in plan.quantized} - {*store.files(), *fallbacks}
    if lost:
        raise PlanMismatchError(
            f"{len(lost)} weights, such as {min(lost)}, were neither calibrated nor said to be "
            "rounded to nearest. This is a fault of this program: please report it with the "
            "model's name."
        )
    if fallbacks:
        first = next(iter(fallbacks))
        reporter.note(
            f"{len(fallbacks)} of {len(plan.quantized)} weights are rounded to nearest after all, "
            f"such as {first}: {fallbacks[first]}."
        )
    kept = already_kept
    with enough_memory(device), measured_on_device() as sensitivity:
        if kept is None:
            kept = _kept(build, plan, store, tokens, settings, device, reporter)
    taken = {"sampling": sampling or DeviceUsage(), "pass": passing, "sensitivity": sensitivity}
    facts = {
        "source": tokens.source,
        "sequences": len(tokens.ids),
        "tokens": int(tokens.ids.size),
        "tokens_sha256": tokens.sha256,
        "device": kind,
        "fallbacks": fallbacks,
        "kept": kept,
        "extra_bytes": sum(module["bytes"] for module in kept),
    }
    of_the_machine = {
        "seconds": {name: round(usage.seconds, 2) for name, usage in taken.items()} | parts,
        "peak_device_memory_bytes": {name: usage.peak_memory for name, usage in taken.items()},
    }
    return Calibration(store.files(), kept, facts | of_the_machine, identity=store.folder.name)


def _kept(
    build: Build,
    plan: Plan,
    store: Store,
    tokens: CalibrationTokens,
    settings: Settings,
    device: str,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """The modules that the byte budget leaves in 16 bit."""
    recipe = settings.recipe.quantize
    if not recipe.extra_share:
        return []
    from nf4_pipeline.calibration.allocation import within
    from nf4_pipeline.calibration.sensitivity import measure

    losses = store.measured()
    if losses is None:
        losses = measure(
            build.source, plan.quantized, store.files(), tokens, device=device, reporter=reporter
        )
        store.keep_measured(losses)
    stored = sum(part.nbytes for tensor in plan.quantized for part in tensor.stored)
    kept = within(losses, int(recipe.extra_share * stored))
    return [loss.as_json() for loss in kept]


@contextmanager
def enough_memory(device: str) -> Iterator[None]:
    """Says what can be done if a device has too little memory for the body.

    Raises:
        ResourceError: so it is.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"The memory of {device} is too small to calibrate this model "
            f"({str(error).split('. ')[0]}). End other programs that use it, name another "
            "--device, or round to nearest (without --calibrate). What is done is kept."
        ) from error


def published(build: Build, facts: dict[str, Any]) -> bytes:
    """What the artifact holds of it, so that others can do it again: tokens, and what was kept.

    Raises:
        BuildError: the tokens are not those that were used.
    """
    from nf4_pipeline.calibration.tokens import read_tokens

    tokens = read_tokens(tokens_path(build))
    if tokens is None or tokens.sha256 != facts["tokens_sha256"]:
        raise BuildError(
            f"{tokens_path(build)} does not hold the tokens that `quantize` used (sha256 "
            f"{facts['tokens_sha256'][:12]}…). Run `nf4 quantize` again."
        )
    return as_file(tokens, facts["kept"])


def kept_modules(kept: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """The modules of `Calibration.kept`, or of the same list in a record."""
    return frozenset(module["module"] for module in kept)


def as_file(tokens: CalibrationTokens, kept: list[dict[str, Any]]) -> bytes:
    """What stands in `CALIBRATION_FILE`.

    Args:
        tokens: what was read.
        kept: as in `Calibration`.
    """
    return json_bytes({**tokens.as_json(), "kept": kept})


def chosen_bytes(build: Build) -> int:
    """What choices take on the disk already."""
    return sum(path.stat().st_size for path in folder(build).glob("*/*") if path.is_file())


def clear(build: Build) -> None:
    """Deletes what was chosen; it stands in quantized/ now."""
    for path in folder(build).iterdir():
        if path.is_dir():
            shutil.rmtree(path)
