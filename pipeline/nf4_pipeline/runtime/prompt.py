"""Prompts answered by a model in a process of its own, which stays for the next one.

Model, tokenizer and template are strangers' work: what they take is limited there, and none of it
is left here. Where a model is on the Hub it is fetched by this process; the other one is offline.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nf4_pipeline.documents import Document
from nf4_pipeline.errors import ArtifactError
from nf4_pipeline.processes.parent_side import ChildFailed, Session
from nf4_pipeline.processes.worker import Worker
from nf4_pipeline.progress import SILENT, Reporter, SilentReporter, Task
from nf4_pipeline.runtime.artifact import open_folder
from nf4_pipeline.runtime.generate import Answer, Sampling

WITHOUT_TEMPLATE: Final = "Leave it out (--raw, or chat=False)."


@dataclass(frozen=True)
class PromptRequest(Document):
    """One prompt.

    Attributes:
        folder: of the model.
        device: "auto", "cpu", "cuda" or "cuda:N".
        query: the prompt.
        sampling: how tokens are chosen.
        chat: put the prompt into the model's chat template, if it has one.
        streams: notes bring the pieces of the answer as they come.
    """

    folder: Path
    device: str
    query: str
    sampling: Sampling
    chat: bool
    streams: bool


@dataclass(frozen=True)
class PromptReply(Document):
    """The answers to a prompt, and the device where they were written."""

    answers: tuple[Answer, ...]
    device: str


WORKER: Final = Worker[PromptRequest, PromptReply](
    "nf4_pipeline.runtime.prompt_worker", PromptReply
)


class _Loaded:
    """The one model that this process has loaded in another one."""

    def __init__(self) -> None:
        self._session: Session[PromptRequest, PromptReply] | None = None
        self._of: tuple[Path, str] | None = None
        self._lock = threading.Lock()

    def ask(self, request: PromptRequest, reporter: Reporter) -> PromptReply:
        of = (request.folder, request.device)
        with self._lock:
            if self._session is None or self._of != of or not self._session.is_usable:
                self._close()
                self._session, self._of = Session(WORKER), of
            return self._session.ask(request, reporter)

    def close(self) -> None:
        with suppress(KeyboardInterrupt):
            self._close()

    def _close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


_LOADED: Final = _Loaded()
atexit.register(_LOADED.close)


class _Pieces(SilentReporter):
    """A reporter to whom notes are pieces of an answer."""

    def __init__(self, show: Callable[[str], None], reporter: Reporter) -> None:
        self._show, self._reporter = show, reporter

    def task(
        self, title: str, total: int | None, *, unit: str = "bytes"
    ) -> AbstractContextManager[Task]:
        return self._reporter.task(title, total, unit=unit)

    def note(self, text: str) -> None:
        self._show(text)


def ask(
    query: str,
    artifact: str | Path | None,
    sampling: Sampling,
    *,
    device: str = "auto",
    chat: bool = True,
    show: Callable[[str], None] | None = None,
    reporter: Reporter = SILENT,
) -> PromptReply:
    """Answers a query as `prompt` does, and says more of it.

    Args:
        query: what to answer or to continue.
        artifact: see `prompt`.
        sampling: how tokens are chosen.
        device: see `prompt`.
        chat: see `prompt`.
        show: gets the pieces of a single answer as they come.
        reporter: told how far it is.

    Raises:
        PipelineError: whatever `prompt` raises, under the same conditions.
    """
    folder = open_folder(artifact, reporter).absolute()
    request = PromptRequest(folder, device, query, sampling, chat, show is not None)
    try:
        return _LOADED.ask(request, reporter if show is None else _Pieces(show, reporter))
    except ChildFailed as failure:
        raise ArtifactError(
            f"The process that runs {folder} ended with status {failure.status}: {failure.cause}."
        ) from failure


def prompt(
    query: str,
    artifact: str | Path | None = None,
    *,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float | None = None,
    num_return_sequences: int = 1,
    seed: int = 0,
    device: str = "auto",
    chat: bool = True,
) -> list[str]:
    """Answers a query with a 4-bit model, which stays loaded for the next call.

    It runs in a process of its own, which ends with this one.

    Args:
        query: what to answer or to continue.
        artifact: an artifact, a build, a plain checkpoint (quantized while loading) or a Hub id;
            None takes the newest build under ./artifacts.
        max_length: prompt and answer together, in tokens.
        max_new_tokens: of the answer, in tokens; 128 if neither is given.
        top_k: draw from the k likeliest tokens.
        top_p: draw from the likeliest tokens that make up this probability.
        temperature: of the draws; 0 is greedy. Without any of the three, answers are greedy unless
            several are asked for.
        num_return_sequences: how many answers.
        seed: of the draws.
        device: "auto", "cpu", "cuda" or "cuda:N".
        chat: use the model's chat template, if it has one.

    Returns:
        The answers, `num_return_sequences` of them, without the query.

    Raises:
        UsageError: there is no such model, or a value of the sampling is out of its range.
        ArtifactError: the model or its tokenizer cannot be loaded, its chat template fails, or one
            of them takes more time or memory than any real one.
        SourceError: the folder holds no weights in safetensors, a file leads out of it or is not
            what its name says, or the config is not that of the weights.
        HubError: the Hub does not give the model.
        ResourceError: this machine has no such device.
    """
    sampling = Sampling(
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        top_k=top_k,
        top_p=top_p,
        temperature=temperature,
        num_return_sequences=num_return_sequences,
        seed=seed,
    )
    reply = ask(query, artifact, sampling, device=device, chat=chat)
    return [answer.text for answer in reply.answers]
