"""Asks a checkpoint's tokenizer, a stranger's program, in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nf4_pipeline.calibration.beginnings import Beginnings
from nf4_pipeline.documents import Document
from nf4_pipeline.errors import SourceError
from nf4_pipeline.processes.parent_side import ChildFailed, run
from nf4_pipeline.processes.worker import Worker


@dataclass(frozen=True)
class TokensRequest(Document):
    """What calibration wants to know.

    Attributes:
        source: the checkpoint.
        text: to take tokens from; None to ask how texts begin.
        sequences: of the text, at most.
        length: of each, in tokens.
    """

    source: Path
    text: Path | None
    sequences: int
    length: int


@dataclass(frozen=True)
class TokensReply(Document):
    """How texts begin, and the sequences of the text, if there is one."""

    beginnings: Beginnings
    rows: tuple[tuple[int, ...], ...] = ()


WORKER: Final = Worker[TokensRequest, TokensReply](
    "nf4_pipeline.calibration.tokens_worker", TokensReply
)


def ask_tokenizer(request: TokensRequest) -> TokensReply:
    """What the tokenizer says.

    Raises:
        RecipeError: the text cannot be read, holds less than one sequence, or there is no tokenizer
            for it.
        SourceError: the tokenizer fails, takes more than any real one, or its process died.
    """
    try:
        return run(WORKER, request)
    except ChildFailed as failure:
        raise SourceError(
            f"The process that runs the tokenizer of {request.source} ended with status "
            f"{failure.status}: {failure.cause}"
        ) from failure
