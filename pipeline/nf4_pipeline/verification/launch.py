"""Asks both models, each in a process of its own, and compares what two artifacts left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from nf4_pipeline.documents import Document
from nf4_pipeline.errors import VerificationError
from nf4_pipeline.fidelity.metrics import Difference, difference
from nf4_pipeline.fidelity.token_scores import TokenScores
from nf4_pipeline.processes import parent_side as child
from nf4_pipeline.processes.worker import Worker
from nf4_pipeline.progress import Reporter
from nf4_pipeline.verification.eval_text import Text
from nf4_pipeline.verification.messages import (
    ArtifactReply,
    ArtifactRequest,
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
    """

    source: Path
    device: str
    device_memory: int
    prompts: Sequence[Prompt]
    max_new_tokens: int
    text: Text
    tokens: int

    def without_prompts(self) -> Examination:
        """The same, on the text alone."""
        return replace(self, prompts=())

    def ask_source(self, artifact: Path, reporter: Reporter) -> SourceReply:
        """The 16-bit model's answers, from a fresh process.

        Args:
            artifact: whose tokenizer is used for both.
            reporter: told how far it is.

        Raises:
            SourceError: the checkpoint could not be loaded.
            VerificationError: the process died.
        """
        request = SourceRequest(
            source=self.source,
            artifact=artifact,
            device=self.device,
            device_memory=self.device_memory,
            prompts=tuple(self.prompts),
            max_new_tokens=self.max_new_tokens,
        )
        return _ask(_SOURCE_WORKER, request, self.source, reporter)

    def ask_artifact(
        self,
        artifact: Path,
        scores: Path,
        reporter: Reporter,
        *,
        nearest: Sequence[str] | None = None,
        logits: Path | None = None,
    ) -> ArtifactReply:
        """The 4-bit model's answers and its distance from the source, from a fresh process.

        Args:
            artifact: the export folder.
            scores: where the scores of all tokens are left (.npz).
            reporter: told how far it is.
            nearest: measure round to nearest beside it, these modules in 4 bit, too; None not to.
            logits: where logits to hold other readers against are left (.npy); None not to.

        Raises:
            ArtifactError: the artifact could not be loaded.
            RecipeError: the text is too short for one sequence.
            VerificationError: the process died.
        """
        request = ArtifactRequest(
            source=self.source,
            artifact=artifact,
            device=self.device,
            device_memory=self.device_memory,
            prompts=tuple(self.prompts),
            max_new_tokens=self.max_new_tokens,
            text=self.text,
            tokens=self.tokens,
            scores=scores,
            nearest=None if nearest is None else tuple(nearest),
            logits=logits,
        )
        return _ask(_ARTIFACT_WORKER, request, artifact, reporter)


def _ask(
    worker: Worker[_Request, _Reply], request: _Request, folder: Path, reporter: Reporter
) -> _Reply:
    try:
        return child.run(worker, request, reporter)
    except child.ChildFailed as failure:
        signal = (
            " Signal 9 usually means that memory ran out: end other programs, then run "
            "`nf4 verify` again."
            if failure.status == -9
            else ""
        )
        raise VerificationError(
            f"The process that runs {folder} ended with status {failure.status}: "
            f"{failure.cause}.{signal}"
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
