"""Asks both models, each in a process of its own, and compares what two artifacts left."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

import numpy as np

from nf4_pipeline.documents import Document
from nf4_pipeline.errors import VerificationError
from nf4_pipeline.fidelity.metrics import Difference, difference
from nf4_pipeline.fidelity.token_scores import TokenScores
from nf4_pipeline.machine import may_have_cuda
from nf4_pipeline.model.probe import WORKER as PROBE
from nf4_pipeline.processes import parent_side as child
from nf4_pipeline.processes.forked import serving
from nf4_pipeline.processes.in_process import is_in_process
from nf4_pipeline.processes.worker import Worker
from nf4_pipeline.progress import Reporter
from nf4_pipeline.readers.stock import READER, StockReply, StockRequest
from nf4_pipeline.resource_usage import available_memory
from nf4_pipeline.runtime.loader import pick_device
from nf4_pipeline.verification.eval_text import Text
from nf4_pipeline.verification.messages import (
    ArtifactReply,
    ArtifactRequest,
    Baselines,
    SourceReply,
    SourceRequest,
)
from nf4_pipeline.verification.prompts import Prompt

_SOURCE_WORKER: Final = Worker[SourceRequest, SourceReply](
    "nf4_pipeline.verification.source_worker", SourceReply
)
_ARTIFACT_WORKER: Final = Worker[ArtifactRequest, ArtifactReply](
    "nf4_pipeline.verification.artifact_worker", ArtifactReply
)

_PLENTY: Final = 6 * 2**30
"""Bytes of free memory beside which three waiting processes do no harm."""

_Request = TypeVar("_Request", bound=Document)
_Reply = TypeVar("_Reply", bound=Document)


@dataclass(frozen=True)
class Examination:
    """What is asked of both models.

    Attributes:
        source: the checkpoint folder.
        device: "cpu" or "cuda:N".
        device_memory: bytes of the device that may be used; 0 for all that is free.
        prompts: asked of both.
        max_new_tokens: of each answer.
        text: what they are compared on; random token ids if it has no domains.
        tokens: of it.
        served: as in `SourceRequest`.
        shares: as in `ArtifactRequest`.
    """

    source: Path
    device: str
    device_memory: int
    prompts: Sequence[Prompt]
    max_new_tokens: int
    text: Text
    tokens: int
    served: Path | None = None
    shares: tuple[Path, ...] = ()

    def without_prompts(self) -> Examination:
        """The same, on the text alone, of which nobody has compared anything."""
        return replace(self, prompts=(), shares=())

    def ask_both(
        self,
        artifact: Path,
        scores: Path,
        workers: Workers,
        reporter: Reporter,
        *,
        baselines: Baselines | None = None,
        logits: Path | None = None,
        together: bool,
    ) -> tuple[SourceReply, ArtifactReply]:
        """What both models say, each from a fresh process.

        Args:
            artifact: the export folder, whose tokenizer is used for both.
            scores: as in `ask_artifact`, like `baselines` and `logits`.
            workers: the processes.
            reporter: told how far they are.
            together: both at the same time; else one after the other.

        Raises:
            ArtifactError: the artifact could not be loaded.
            SourceError: the checkpoint could not be loaded.
            RecipeError: the text is too short for one sequence.
            VerificationError: a process died.
        """
        source = self.source_request(artifact)
        export = self.artifact_request(artifact, scores, baselines, logits)
        if not together:
            in_16_bit = _ask(workers.source(), source, self.source, reporter)
            return in_16_bit, _ask(workers.artifact(), export, artifact, reporter)
        with ExitStack() as stack:
            children = (
                stack.enter_context(workers.source().start(source, reporter)),
                stack.enter_context(workers.artifact().start(export, reporter)),
            )
            pool = stack.enter_context(ThreadPoolExecutor(len(children), "verify"))
            first: Future[SourceReply] = pool.submit(_wait, children[0], self.source)
            second: Future[ArtifactReply] = pool.submit(_wait, children[1], artifact)
            try:
                return first.result(), second.result()
            except BaseException:
                for child_at_work in children:
                    child_at_work.close()  # else its thread would go on waiting
                raise

    def source_request(self, artifact: Path) -> SourceRequest:
        """What the process is asked that runs the 16-bit model.

        Args:
            artifact: whose tokenizer is used for both.
        """
        return SourceRequest(
            source=self.source,
            artifact=artifact,
            device=self.device,
            device_memory=self.device_memory,
            prompts=tuple(self.prompts),
            max_new_tokens=self.max_new_tokens,
            served=self.served,
        )

    def ask_artifact(
        self,
        artifact: Path,
        scores: Path,
        reporter: Reporter,
        *,
        baselines: Baselines | None = None,
        logits: Path | None = None,
    ) -> ArtifactReply:
        """The 4-bit model's answers and its distance from the source, from a fresh process.

        Args:
            artifact: the export folder.
            scores: where the scores of all tokens are left (.npz).
            reporter: told how far it is.
            baselines: what is measured beside it; None for nothing.
            logits: where logits to hold other readers against are left (.npy); None not to.

        Raises:
            ArtifactError: the artifact could not be loaded.
            RecipeError: the text is too short for one sequence.
            VerificationError: the process died.
        """
        request = self.artifact_request(artifact, scores, baselines, logits)
        with child.Waiting(_ARTIFACT_WORKER) as waiting:
            return _ask(waiting, request, artifact, reporter)

    def artifact_request(
        self,
        artifact: Path,
        scores: Path,
        baselines: Baselines | None,
        logits: Path | None = None,
    ) -> ArtifactRequest:
        """What the process is asked that runs the 4-bit model; see `ask_artifact`."""
        return ArtifactRequest(
            source=self.source,
            artifact=artifact,
            device=self.device,
            device_memory=self.device_memory,
            prompts=tuple(self.prompts),
            max_new_tokens=self.max_new_tokens,
            served=self.served,
            text=self.text,
            tokens=self.tokens,
            scores=scores,
            baselines=baselines or Baselines(),
            logits=logits,
            shares=self.shares,
        )


class Workers:
    """The processes that verify. They may be started early: then they import while others work.

    What they will work on they are told only when it is there. Leaving its `with` ends them.

    Args:
        device: as the user named it.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device, self._begun = device, False
        self._stack = ExitStack()
        self._source: child.Waiting[SourceRequest, SourceReply] | None = None
        self._artifact: child.Waiting[ArtifactRequest, ArtifactReply] | None = None
        self._stock: child.Waiting[StockRequest, StockReply] | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def begin(self) -> None:
        """Starts them once, unless memory is short: each takes some 0.5 GB before it is asked.

        Where there is no GPU, one process imports for both models, and for the probe of the source;
        a fork of a process that may have asked for a GPU cannot use it.
        """
        available = available_memory()
        if self._begun or is_in_process() or (available is not None and available < _PLENTY):
            return
        self._begun = True
        if may_have_cuda():
            self._source, self._artifact = self.source(), self.artifact()
            # This process, too, will ask torch which GPUs there are, and how much memory is free.
            self._stack.enter_context(ThreadPoolExecutor(1)).submit(pick_device, self._device)
        else:
            modules = (PROBE.module, _SOURCE_WORKER.module, _ARTIFACT_WORKER.module)
            self._stack.enter_context(serving(modules))
        self._stock = self.stock()

    def source(self) -> child.Waiting[SourceRequest, SourceReply]:
        """The one that runs the 16-bit model; may be asked once."""
        begun, self._source = self._source, None
        return begun or self._stack.enter_context(child.Waiting(_SOURCE_WORKER))

    def artifact(self) -> child.Waiting[ArtifactRequest, ArtifactReply]:
        """The one that runs the artifact; may be asked once."""
        begun, self._artifact = self._artifact, None
        return begun or self._stack.enter_context(child.Waiting(_ARTIFACT_WORKER))

    def stock(self) -> child.Waiting[StockRequest, StockReply]:
        """The one that reads the artifact with stock transformers; may be asked once."""
        begun, self._stock = self._stock, None
        return begun or self._stack.enter_context(child.Waiting(READER))


def _ask(
    waiting: child.Waiting[_Request, _Reply], request: _Request, folder: Path, reporter: Reporter
) -> _Reply:
    with waiting.start(request, reporter) as asked:
        return _wait(asked, folder)


def _wait(asked: child.Child[_Reply], folder: Path) -> _Reply:
    try:
        return asked.wait()
    except child.ChildFailed as failure:
        raise VerificationError(
            f"The process that runs {folder} ended with status {failure.status}: {failure.cause}."
        ) from failure


def compare_scores(first: Path, second: Path) -> Difference:
    """Holds the scores that two artifacts left against each other.

    Args:
        first: .npz of the one.
        second: .npz of the other; of the same source and text.
    """
    with np.load(first) as one, np.load(second) as other:
        lengths, domains = one["lengths"].tolist(), one["domains"].tolist()
        return difference(_load_scores(one), _load_scores(other), lengths, domains)


def _load_scores(arrays: Any) -> TokenScores:
    return TokenScores(*(arrays[field.name] for field in fields(TokenScores)))
