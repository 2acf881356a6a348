"""Tokens, then codes and scales for a whole checkpoint; kept in a folder until they are used.

What stands in the folder: the tokens, which are part of what the bytes follow from; what each
layer loses, if that was asked for; and while it runs, what is chosen, block by block, so that a
killed run goes on where it stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from nf4_pipeline.calibration.calibration_facts import CalibrationFacts
from nf4_pipeline.checkpoint.atomic import json_bytes, make_folder, write_json
from nf4_pipeline.checkpoint.digest import digest_file, json_sha256
from nf4_pipeline.checkpoint.plain_file import check_plain, why_unreadable
from nf4_pipeline.errors import BuildError, PlanMismatchError, RecipeError, ResourceError
from nf4_pipeline.manifest.manifest import KeptModule, LearningSummary
from nf4_pipeline.near_names import did_you_mean
from nf4_pipeline.nf4.rounding import NearestOnCpu, Rounding
from nf4_pipeline.progress import LOADING, SILENT, Reporter
from nf4_pipeline.recipe import QuantizeRecipe
from nf4_pipeline.resource_usage import DeviceUsage, measured_on_device
from nf4_pipeline.selection import Plan, TensorPlan

if TYPE_CHECKING:
    from nf4_pipeline.calibration.block_store import BlockStore
    from nf4_pipeline.calibration.learning import Learning
    from nf4_pipeline.calibration.tokens import CalibrationTokens

CODE_VERSION: Final = 5
TOKENS_FILE: Final = "tokens.json"
_LOSSES_FILE: Final = "sensitivity.json"
_BEFORE_LEARNING: Final = "before_learning"


@dataclass(frozen=True)
class CalibratedChoice:
    """Codes and scales that were chosen for a checkpoint.

    Attributes:
        files: name of a weight -> the file that holds its codes and scales.
        facts: for the record and the manifest.
        identity: of all that was chosen from; the same gives the same bytes.
    """

    files: dict[str, Path]
    facts: CalibrationFacts
    identity: str

    def rounding(self) -> Rounding:
        """The choices, for the engine; weights without one are rounded to nearest."""
        from nf4_pipeline.gptq.saved_codes import PrecomputedRounding

        return PrecomputedRounding(self.files, NearestOnCpu())


@dataclass(frozen=True)
class Calibrator:
    """Calibrates one checkpoint.

    Attributes:
        source: the folder of the 16-bit checkpoint.
        content_sha256: of that checkpoint.
        folder: where tokens and choices are kept.
        recipe: what is read, how much of it, and how much larger the artifact may be for modules
            that stay in 16 bit.
        device: where the model runs: "auto", "cpu", "cuda" or "cuda:N". Codes are chosen on all
            GPUs of the first one's kind if it has no number; all else is done on one device.
    """

    source: Path
    content_sha256: str
    folder: Path
    recipe: QuantizeRecipe
    device: str

    @property
    def tokens_path(self) -> Path:
        return self.folder / TOKENS_FILE

    def key_part(self) -> dict[str, int | str | None]:
        """What calibration adds to the key of what is quantized; no tokens, nothing done yet.

        Raises:
            RecipeError: the calibration text cannot be read.
        """
        from nf4_pipeline.calibration.tokens import read_tokens

        kept = read_tokens(self.tokens_path)
        fits = kept is not None and kept.key == self._tokens_key()
        return {"code": CODE_VERSION, "tokens": kept.sha256 if kept is not None and fits else None}

    def _tokens_key(self) -> str:
        """Depends on the source, on what is read, and on how much of it."""
        from nf4_pipeline.calibration.beginnings import MIX, OPENINGS, SEEDS

        path = text_path(self.recipe)
        text = None if path is None else digest_file(path).sha256
        begins = [*(digest_file(file).sha256 for file in (OPENINGS, SEEDS)), asdict(MIX)]
        return json_sha256(
            {
                "code": CODE_VERSION,
                "source": self.content_sha256,
                "text": text,
                "tokens": self.recipe.calibration_tokens,
                "begins": begins if path is None else None,
            }
        )

    def tokens(self, reporter: Reporter) -> CalibrationTokens:
        """The tokens that calibration reads: those that are kept, or new ones.

        Raises:
            RecipeError: a text cannot be read, or is too short.
            ResourceError: the device has too little memory for the model.
        """
        with reporter.task(LOADING, None):
            from nf4_pipeline.calibration.sampling import make_tokens
            from nf4_pipeline.calibration.tokens import read_tokens
            from nf4_pipeline.runtime.loader import pick_device

        key = self._tokens_key()
        kept = read_tokens(self.tokens_path)
        if kept is not None and kept.key == key:
            return kept
        device = pick_device(self.device)
        with _enough_memory(device):
            tokens = make_tokens(
                self.source,
                text_path(self.recipe),
                self.recipe.calibration_tokens,
                key,
                device,
                reporter,
            )
        make_folder(self.folder)
        write_json(self.tokens_path, tokens.document().to_json())
        return tokens

    def choose(
        self,
        plan: Plan,
        tokens: CalibrationTokens,
        reporter: Reporter,
        *,
        kept: Sequence[KeptModule] | None = None,
        sampling: DeviceUsage | None = None,
        expected_learning: LearningSummary | None = None,
    ) -> CalibratedChoice:
        """Chooses codes and scales for everything that a plan quantizes, or goes on doing so.

        Args:
            plan: before modules are kept for what they lose.
            tokens: what the model reads.
            reporter: told how far it is, and of weights that are rounded to nearest after all.
            kept: modules that are known to stay in 16 bit; None to find them.
            sampling: what finding the tokens took, for the facts.
            expected_learning: how the codes of an artifact learned, if others must not come of it.

        Raises:
            ResourceError: the device has too little memory for the model, or the model writes other
                tokens on it than those that are expected.
            RecipeError: the tokens are none of this model's, or the text is too short to learn
                from.
            CheckpointError: codes cannot learn from this model.
            PlanMismatchError: a weight got neither codes nor a reason why it has none.
        """
        with reporter.task(LOADING, None):
            from nf4_pipeline.calibration.block_store import BlockStore
            from nf4_pipeline.calibration.calibration_pass import TOGETHER, calibrate
            from nf4_pipeline.gptq.device_group import DIVISIONS
            from nf4_pipeline.runtime.loader import devices_alike, pick_device

        device = pick_device(self.device)
        devices = devices_alike(self.device)
        kind = device.partition(":")[0]
        with _enough_memory(device), measured_on_device() as sensitivity:
            if kept is None:
                kept = self._sensitive(plan, tokens, device, reporter)
        # What is in 4 bit is chosen for a model in which these are exact.
        exact = {module.module for module in kept}
        weights = [tensor for tensor in plan.quantized if tensor.module not in exact]
        identity = {
            "code": CODE_VERSION,
            "source": self.content_sha256,
            "tokens": tokens.sha256,
            "device": kind,
            "torch": version("torch"),  # what it computes may change with it
            "weights": [tensor.name for tensor in weights],
            "division": [TOGETHER[kind], *astuple(DIVISIONS[kind])],
        }
        store = BlockStore(self.folder / json_sha256(identity)[:12])
        store.open()
        if len(devices) > 1:
            reporter.detail(f"Codes are chosen on {len(devices)} GPUs: {', '.join(devices)}.")
        with _enough_memory(" or ".join(devices)), measured_on_device() as passing:
            parts = calibrate(
                self.source, weights, tokens, store, devices=devices, reporter=reporter
            )
        fallbacks = store.fallbacks()
        _check_complete(weights, store, fallbacks)
        if fallbacks:
            first = next(iter(fallbacks))
            reporter.note(
                f"{len(fallbacks)} of {len(weights)} weights are rounded to nearest after "
                f"all, such as {first}: {fallbacks[first]}."
            )
        taken = {"sampling": sampling or DeviceUsage(), "pass": passing, "sensitivity": sensitivity}
        learned = None
        if self.recipe.effort:
            with _enough_memory(device, "--effort"), measured_on_device() as taken["learning"]:
                learning = self._learning(plan, store, kept, device)
                learned = learning.run(reporter, expected=expected_learning)
            store, parts = learning.store, parts | learning.seconds
        facts = CalibrationFacts(
            source=cast("Any", tokens.source),
            sequences=len(tokens.ids),
            tokens=int(tokens.ids.size),
            tokens_sha256=tokens.sha256,
            device=cast("Any", kind),
            fallbacks=fallbacks,
            kept=tuple(kept),
            extra_bytes=sum(module.bytes for module in kept),
            learning=learned,
            seconds={name: round(usage.seconds, 2) for name, usage in taken.items()} | parts,
            peak_device_memory_bytes={name: usage.peak_memory for name, usage in taken.items()},
        )
        return CalibratedChoice(store.files(), facts, identity=store.folder.name)

    def _learning(
        self, plan: Plan, store: BlockStore, kept: Sequence[KeptModule], device: str
    ) -> Learning:
        """What lets the codes of a store learn."""
        from nf4_pipeline.calibration.learning import Learning

        modules = {module.module for module in kept}
        return Learning(self.source, plan, modules, store, text_path(self.recipe), device)

    def check_memory(self, plan: Plan, reporter: Reporter = SILENT) -> None:
        """Refuses to begin what will not fit the device once codes learn.

        Args:
            plan: before modules are kept for what they lose.
            reporter: told what is done.

        Raises:
            ResourceError: the device has too little memory, or is not there.
        """
        if not self.recipe.effort:
            return
        with reporter.task(LOADING, None):
            from nf4_pipeline.calibration.learning import check_blocks, check_memory
            from nf4_pipeline.runtime.loader import pick_device

        device = pick_device(self.device)
        check_memory(plan, plan.quantized, device)
        if any(path.is_dir() for path in self.folder.glob("*-*")):  # of a run that has looked
            return
        with _enough_memory(device, "--effort"), reporter.task("look at the blocks", None):
            check_blocks(self.source, plan, plan.quantized, device)

    def _sensitive(
        self, plan: Plan, tokens: CalibrationTokens, device: str, reporter: Reporter
    ) -> Sequence[KeptModule]:
        """The modules that the byte budget leaves in 16 bit."""
        if not self.recipe.extra_share:
            return ()
        from nf4_pipeline.calibration.allocation import select_within_budget
        from nf4_pipeline.calibration.sensitivity import measure_losses

        key = json_sha256(
            {
                "code": CODE_VERSION,
                "source": self.content_sha256,
                "tokens": tokens.sha256,
                "device": device.partition(":")[0],
                "weights": [tensor.name for tensor in plan.quantized],
            }
        )
        losses = measure_losses(
            self.source,
            plan.quantized,
            tokens,
            self.folder / _LOSSES_FILE,
            key,
            device=device,
            reporter=reporter,
        )
        stored = sum(part.nbytes for tensor in plan.quantized for part in tensor.stored)
        selected = select_within_budget(losses, int(self.recipe.extra_share * stored))
        return [KeptModule(module=loss.module, kl=loss.kl, bytes=loss.bytes) for loss in selected]

    def chosen_bytes(self) -> int:
        """What choices take on the disk already, without those of an earlier artifact."""
        return sum(
            path.stat().st_size
            for path in self.folder.glob("*/*")
            if path.is_file() and path.parent.name != _BEFORE_LEARNING
        )

    def clear(self) -> None:
        """Deletes what was chosen, once it stands in quantized files.

        The tokens stay, and so do the codes that learning began with: verify shows what it changed.
        """
        before = self.folder / _BEFORE_LEARNING
        stores = [path for path in self.folder.iterdir() if path.is_dir() and path != before]
        learned = {path.name.partition("-")[0] for path in stores if "-" in path.name}
        if stores or not self.recipe.effort:
            shutil.rmtree(before, ignore_errors=True)
        for path in stores:
            if path.name in learned:
                path.rename(before)
            else:
                shutil.rmtree(path)


def codes_before_learning(folder: Path) -> dict[str, Path]:
    """The calibrated codes that learning began with, if they are still there.

    Args:
        folder: of a calibrator.

    Returns:
        Name of a weight -> the file that holds its codes and scales.
    """
    from nf4_pipeline.calibration.block_store import BlockStore

    return BlockStore(folder / _BEFORE_LEARNING).files()


def text_path(recipe: QuantizeRecipe) -> Path | None:
    """The text to calibrate on; None if the model writes its tokens, or nothing is calibrated.

    Raises:
        RecipeError: the recipe names a file that does not exist, is no plain file, or is too large.
    """
    if recipe.calibrate in ("", "self"):
        return None
    path = Path(recipe.calibrate)
    from nf4_pipeline.calibration.tokens import LARGEST

    try:
        check_plain(path, LARGEST)
    except OSError as error:
        is_word = recipe.calibrate == path.stem
        near = did_you_mean(recipe.calibrate, ["self"]) if is_word else ""
        remedy = near or ' Name another, or "self" for tokens that the model writes.'
        raise RecipeError(
            f"The calibration text {path} cannot be read: {why_unreadable(error)}.{remedy}"
        ) from error
    return path


def published_tokens(folder: Path, facts: CalibrationFacts) -> bytes:
    """The content of calibration.json, from the tokens that are kept in a calibrator's folder.

    Raises:
        BuildError: the tokens that are kept are not those that were used.
    """
    from nf4_pipeline.calibration.tokens import read_tokens

    path = folder / TOKENS_FILE
    tokens = read_tokens(path)
    if tokens is None or tokens.sha256 != facts.tokens_sha256:
        raise BuildError(
            f"{path} does not hold the tokens that `quantize` used (sha256 "
            f"{facts.tokens_sha256[:12]}…). Run `nf4 quantize` again."
        )
    return calibration_file(tokens, facts)


def calibration_file(tokens: CalibrationTokens, facts: CalibrationFacts) -> bytes:
    """The content of calibration.json: the tokens, and the modules that were kept."""
    return json_bytes(tokens.document(tuple(facts.kept)).to_json())


_WITHOUT: Final = {"--calibrate": "round to nearest", "--effort": "calibrate alone"}


def _check_complete(
    weights: Sequence[TensorPlan], store: BlockStore, fallbacks: dict[str, str]
) -> None:
    lost = {tensor.name for tensor in weights} - {*store.files(), *fallbacks}
    if lost:
        raise PlanMismatchError(
            f"{len(lost)} weights, such as {min(lost)}, were neither calibrated nor said to be "
            "rounded to nearest. This is a fault of this program: please report it with the "
            "model's name."
        )


@contextmanager
def _enough_memory(device: str, option: str = "--calibrate") -> Iterator[None]:
    """Says what can be done if a device has too little memory for the body.

    Args:
        device: "cpu" or "cuda:N", or several of these in words.
        option: without which less is needed.

    Raises:
        ResourceError: the memory of the device ran out.
    """
    import torch

    one = " (cuda:N takes one GPU)" if " or " in device else ""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"The memory of {device} is too small to calibrate this model "
            f"({str(error).split('. ')[0]}). End other programs that use it, name another "
            f"--device{one}, or {_WITHOUT[option]} (without {option}). What is done is kept."
        ) from error
