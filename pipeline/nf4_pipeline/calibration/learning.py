"""Codes that were calibrated learn: from a store of codes to another one, with the same scales."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from nf4_pipeline.blocks.block_row import BlockRow, NotInARowError
from nf4_pipeline.blocks.streamed_model import StreamedModel, free_memory
from nf4_pipeline.calibration.block_store import BlockStore
from nf4_pipeline.calibration.held_models import HeldModels
from nf4_pipeline.calibration.host_memory import HostMemory
from nf4_pipeline.calibration.learner import (
    Learner,
    Models,
    Saved,
    learning_dtype,
)
from nf4_pipeline.calibration.learning_plan import (
    LearningPlan,
    check_memory_of_learning,
    memory_by_block,
    memory_of_learning,
    plan_learning,
)
from nf4_pipeline.calibration.learning_tokens import LearningTokens, learning_tokens
from nf4_pipeline.calibration.models_by_block import ModelsByBlock
from nf4_pipeline.checkpoint.atomic import write_json
from nf4_pipeline.checkpoint.digest import json_sha256
from nf4_pipeline.errors import ResourceError
from nf4_pipeline.gptq.quantizer import QuantizedWeight
from nf4_pipeline.gptq.saved_codes import read_codes
from nf4_pipeline.manifest.manifest import LearningSummary
from nf4_pipeline.model.fast_attention import use_fast_attention
from nf4_pipeline.progress import Reporter
from nf4_pipeline.runtime.determinism import deterministic
from nf4_pipeline.selection import Plan, TensorPlan

CODE_VERSION: Final = 5
_STATE: Final = "learning.state"
_SUMMARY: Final = "learning.json"
_TOKENS: Final = "tokens"
_SHARE_OF_HOST: Final = 0.8  # of the memory that is free


class Learning:
    """Lets the codes of one calibration learn.

    Args:
        source: the 16-bit checkpoint.
        plan: before modules are kept for what they lose.
        kept: modules that stay in 16 bit.
        calibrated: the store with the codes that learning begins with.
        text: to learn from; None to let the model write.
        device: "cpu" or "cuda:N".
        how: how it learns; None for what fits the model and the device.
    """

    def __init__(
        self,
        source: Path,
        plan: Plan,
        kept: Collection[str],
        calibrated: BlockStore,
        text: Path | None,
        device: str,
        how: LearningPlan | None = None,
    ) -> None:
        self._source = source
        self._plan = plan
        self._calibrated = calibrated
        self._text = text
        self._device = device
        self._how = how
        self._files = calibrated.files()
        quantized = [tensor for tensor in plan.quantized if tensor.module not in kept]
        self._learned = [tensor for tensor in quantized if tensor.name in self._files]
        self._rounded = [tensor for tensor in quantized if tensor.name not in self._files]
        identity = {
            "code": CODE_VERSION,
            "from": calibrated.folder.name,
            "kept": sorted(kept),
            "how": None if how is None else asdict(how),
        }
        name = f"{calibrated.folder.name}-{json_sha256(identity)[:12]}"
        self.store = BlockStore(calibrated.folder.with_name(name))
        self.seconds: dict[str, float] = {}
        """Wall-clock time of the parts of `run`, as far as they were done now."""

    def run(
        self,
        reporter: Reporter,
        *,
        expected: LearningSummary | None = None,
        seconds: float = 8.0,
        saved: Saved | None = None,
    ) -> LearningSummary:
        """Fills `store`, or goes on doing so.

        Args:
            reporter: told how far it is.
            expected: how the codes of an artifact learned, if others must not come of it.
            seconds: between two states that a killed run goes on from, at least.
            saved: told of each of them.

        Raises:
            RecipeError: the text cannot be read, or is too short to learn from.
            CheckpointError: predictions are not finite, or gradients cannot be computed.
            SourceError: the tokenizer fails, or takes more than any real one.
            ResourceError: the device has too little memory, or what is expected cannot come of it:
                the model writes other tokens on it, or this version takes other steps.
        """
        self.store.open()
        done = self._finished()
        if done is not None:
            return done
        check_memory(self._plan, self._learned, self._device)
        with self._timed("drawing"):
            tokens = self._tokens(expected, reporter)
        with self._timed("steps"):
            learner = self._learn(tokens, reporter, seconds, saved)
        self._write(learner.best)
        end = learner.progress
        summary = LearningSummary(
            sequences=len(tokens.ids),
            tokens=int(tokens.ids.size),
            held_back=len(tokens.held_back),
            tokens_sha256=tokens.sha256,
            steps=end.step,
            rate=tokens.plan.rate,
            halvings=end.halvings,
            kl_before=float(f"{end.start_kl:.4g}"),
            kl_after=float(f"{end.best_kl:.4g}"),
        )
        write_json(self.store.folder / _SUMMARY, summary.to_json())
        (self.store.folder / _STATE).unlink(missing_ok=True)
        reporter.note(
            f"Codes learned: KL on held-back samples {summary.kl_before:.4g} before, "
            f"{summary.kl_after:.4g} after."
        )
        return summary

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - start, 2)

    def _finished(self) -> LearningSummary | None:
        """What an earlier run noted, if all that it chose stands there."""
        try:
            text = (self.store.folder / _SUMMARY).read_text("utf-8")
            summary = LearningSummary.from_json(json.loads(text))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        whole = all(
            self.store.is_done(block, [*weights, *self._fallbacks(block)])
            for block, weights in self._blocks().items()
        )
        return summary if whole else None

    def _tokens(self, expected: LearningSummary | None, reporter: Reporter) -> LearningTokens:
        with self._opened() as writer:
            config = writer.model.config.get_text_config()
            context = getattr(config, "max_position_embeddings", None)
            how = self._how or plan_learning(
                self._learned,
                writer.device.type,
                context if isinstance(context, int) and context > 1 else None,
            )
            if expected is not None and expected.rate != how.rate:
                raise _not_again(
                    f"learned in steps of {expected.rate:g}, and this version of nf4-pipeline "
                    f"takes steps of {how.rate:g}",
                    "the version",
                )
            folder = self.store.folder / _TOKENS
            tokens = learning_tokens(self._source, self._text, writer, how, folder, reporter)
        if expected is not None and expected.tokens_sha256 != tokens.sha256:
            raise _not_again(
                "learned from tokens that its 16-bit model wrote, and the model writes others on "
                f"this machine (sha256 {tokens.sha256[:16]}…, expected "
                f"{expected.tokens_sha256[:16]}…): which depends on the model of the device and "
                "the versions of torch and nf4-pipeline",
                "a device of the model, and the versions,",
            )
        return tokens

    def _learn(
        self, tokens: LearningTokens, reporter: Reporter, seconds: float, saved: Saved | None
    ) -> Learner:
        """Learns: with both models on the device if they fit, else a block of each at a time."""
        why = _too_large(self._plan, self._learned, self._device)
        state = self.store.folder / _STATE
        if why is None:
            held = self._learn_held(tokens, state, reporter, seconds, saved)
            if held is not None:
                return held
            why = f"the memory of {self._device} was too little for both models at once"
            _give_back(self._device)
        with self._by_block(tokens, why, reporter) as models:
            learner = Learner(models, tokens)
            learner.run(state, reporter, seconds=seconds, saved=saved)
        return learner

    def _learn_held(
        self,
        tokens: LearningTokens,
        state: Path,
        reporter: Reporter,
        seconds: float,
        saved: Saved | None,
    ) -> Learner | None:
        """Learns with both models on the device; None if its memory runs out.

        A method of its own: nothing on the stack refers to the models once it has returned, nor
        does the error, so that what is learned with next can have their memory.
        """
        try:
            with self._held(tokens) as models:
                learner = Learner(models, tokens)
                learner.run(state, reporter, seconds=seconds, saved=saved)
            return learner
        except torch.OutOfMemoryError:
            return None

    @contextmanager
    def _held(self, tokens: LearningTokens) -> Iterator[Models]:
        with self._opened() as teacher, self._opened() as student:
            yield HeldModels(
                teacher, student, self._learned, self._rounded, self._files, tokens.plan
            )

    @contextmanager
    def _by_block(self, tokens: LearningTokens, why: str, reporter: Reporter) -> Iterator[Models]:
        room = _room_of_host(self._plan, self._learned, self._device)
        with (
            self._opened() as teacher,
            self._opened() as student,
            HostMemory(self.store.folder, room, student.device) as memory,
        ):
            try:
                with deterministic(student.device, strict=True):
                    models = ModelsByBlock(
                        teacher,
                        student,
                        self._learned,
                        self._rounded,
                        self._files,
                        tokens.plan,
                        memory,
                        tokens.held_back,
                    )
            except NotInARowError as error:
                raise _refused(why, error) from error
            reporter.note(
                f"Codes learn block by block: {why}. The result is the same. "
                f"{memory.in_memory / 1e9:,.1f} GB wait in this machine's memory, "
                f"{memory.on_disk / 1e9:,.1f} GB on disk."
            )
            yield models

    def _opened(self) -> StreamedModel:
        return _open(self._source, self._device)

    def _blocks(self) -> Mapping[str, Sequence[str]]:
        """The weights that learn, by the block in whose file they are."""
        blocks: dict[str, list[str]] = {}
        for weight in self._learned:
            block = self._files[weight.name].name.removesuffix(".safetensors")
            blocks.setdefault(block, []).append(weight.name)
        return blocks

    def _fallbacks(self, block: str) -> dict[str, str]:
        facts = self._calibrated.facts(block)
        return {} if facts is None else dict(facts.fallbacks)

    def _write(self, codes: Mapping[str, NDArray[np.uint8]]) -> None:
        """Keeps codes, and the scales that they were calibrated with."""
        for block, names in self._blocks().items():
            facts = self._calibrated.facts(block)
            weights = {}
            for name in names:
                _, scales = read_codes(self._files[name], name)
                cost = facts.costs.get(name, 0.0) if facts is not None else 0.0
                weights[name] = QuantizedWeight(codes[name], scales, cost)
            self.store.write(block, weights, self._fallbacks(block))


def _not_again(why: str, remedy: str) -> ResourceError:
    return ResourceError(
        f"The codes of this artifact {why}. So it cannot be derived again here. Try {remedy} that "
        "made the artifact."
    )


def check_memory(plan: Plan, learned: Sequence[TensorPlan], device: str) -> None:
    """Refuses to begin what the memory of a device cannot hold.

    Args:
        plan: of the checkpoint.
        learned: the weights that learn.
        device: "cpu" or "cuda:N".

    Raises:
        ResourceError: the device has less memory than is needed.
    """
    _give_back(device)
    kind = device.partition(":")[0]
    needed = min(memory_by_block(plan, learned, kind), memory_of_learning(plan, learned, kind))
    check_memory_of_learning(needed, free_memory(torch.device(device)), device)


def check_blocks(source: Path, plan: Plan, learned: Sequence[TensorPlan], device: str) -> None:
    """Refuses what could only learn block by block and cannot; reads the model to find out.

    Args:
        source: the 16-bit checkpoint.
        plan: of it.
        learned: the weights that learn.
        device: "cpu" or "cuda:N".

    Raises:
        ResourceError: both models do not fit the device, and the model's blocks are no row.
    """
    why = _too_large(plan, learned, device)
    if why is None:
        return
    with _open(source, device) as teacher, deterministic(teacher.device, strict=True):
        words = teacher.model.get_input_embeddings().num_embeddings
        context = getattr(teacher.model.config.get_text_config(), "max_position_embeddings", None)
        length = min(16, context) if isinstance(context, int) and context > 0 else 16
        ids = (torch.arange(2 * length, device=teacher.device) % words).reshape(2, length)
        try:
            row = BlockRow(teacher.model, teacher.blocks)
            row.check(ids, teacher.open_ahead, teacher.close)
        except NotInARowError as error:
            raise _refused(why, error) from error


def _open(source: Path, device: str) -> StreamedModel:
    # Codes and scales are of weights as they are stored, and so must both models be.
    streamed = StreamedModel(source, device, learning_dtype(device), rescales=False)
    if streamed.device.type == "cuda":
        use_fast_attention(streamed.model)
    return streamed


def _too_large(plan: Plan, learned: Sequence[TensorPlan], device: str) -> str | None:
    """Why not both models can be on the device at once; None if they can."""
    needed = memory_of_learning(plan, learned, device.partition(":")[0])
    _give_back(device)
    free = free_memory(torch.device(device))
    if needed <= free:
        return None
    return (
        f"both models at once need some {needed / 1e9:,.1f} GB of memory on {device}, and "
        f"{free / 1e9:,.1f} GB are free"
    )


def _refused(why: str, error: NotInARowError) -> ResourceError:
    return ResourceError(
        f"--effort high: {why}. Codes of this model cannot learn block by block either, as "
        f"{error}. Leave --effort out, or name a --device with more memory."
    )


def _give_back(device: str) -> None:
    """What is not used any more counts as free."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def _room_of_host(plan: Plan, learned: Sequence[TensorPlan], device: str) -> int:
    """Bytes of this machine's memory that may be taken for what does not fit a device."""
    free = int(_SHARE_OF_HOST * free_memory(torch.device("cpu")))
    return free - memory_by_block(plan, learned, "cpu") if device == "cpu" else free
