"""Prompts answered by a model in a process of its own, which stays for the next one.

Model, tokenizer and template are strangers' work: what they take is limited there, and none of it
is left here. Where a model is on the Hub it is fetched by this process; the other one is offline.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Final, TypedDict

from nf4_pipeline.documents import Document
from nf4_pipeline.errors import ArtifactError, UsageError
from nf4_pipeline.processes.parent_side import ChildFailed, Session
from nf4_pipeline.processes.worker import Worker
from nf4_pipeline.progress import (
    SILENT,
    ProgressCallback,
    Reporter,
    SilentReporter,
    Task,
    reporting_to,
)
from nf4_pipeline.runtime.artifact import open_folder
from nf4_pipeline.runtime.generate import Answer, Query, Sampling, parse_query

WITHOUT_TEMPLATE: Final = "Leave it out (--raw, or chat=False)."


@dataclass(frozen=True)
class PromptRequest(Document):
    """One prompt.

    Attributes:
        folder: of the model.
        device: "auto", "cpu", "cuda" or "cuda:N".
        query: the prompt.
        sampling: how tokens are chosen.
        chat: put a text into the model's chat template, if it has one.
        streams: notes bring the pieces of the answer as they come.
    """

    folder: Path
    device: str
    query: Query
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

    def __init__(self, show: Callable[[str], object], reporter: Reporter) -> None:
        self._show, self._reporter = show, reporter

    def task(
        self, title: str, total: int | None, *, unit: str = "bytes"
    ) -> AbstractContextManager[Task]:
        return self._reporter.task(title, total, unit=unit)

    def note(self, text: str) -> None:
        if text:
            self._show(text)


def ask(
    query: str | Sequence[Mapping[str, str]],
    artifact: str | PathLike[str] | None,
    sampling: Sampling,
    *,
    revision: str | None = None,
    offline: bool = False,
    device: str = "auto",
    chat: bool = True,
    show: Callable[[str], object] | None = None,
    reporter: Reporter = SILENT,
) -> PromptReply:
    """Answers a query as `prompt` does, and says more of it.

    Args:
        query: what to answer or to continue.
        artifact: see `prompt`.
        sampling: how tokens are chosen.
        revision: see `prompt`.
        offline: see `prompt`.
        device: see `prompt`.
        chat: see `prompt`.
        show: gets the pieces of a single answer as they come.
        reporter: told how far it is.

    Raises:
        PipelineError: whatever `prompt` raises, under the same conditions.
    """
    asked = parse_query(query)
    if not chat and not isinstance(asked, str):
        raise UsageError("Messages go into the chat template: give them without chat=False.")
    if show is not None and sampling.num_return_sequences > 1:
        raise UsageError("Only one answer can be streamed; num_return_sequences asks for several.")
    name = None if artifact is None else fspath(artifact)
    folder = open_folder(name, reporter, revision=revision, offline=offline).absolute()
    request = PromptRequest(folder, device, asked, sampling, chat, show is not None)
    try:
        return _LOADED.ask(request, reporter if show is None else _Pieces(show, reporter))
    except ChildFailed as failure:
        raise ArtifactError(
            f"The process that runs {folder} ended with status {failure.status}: {failure.cause}."
        ) from failure


class PromptOptions(TypedDict, total=False):
    """The keywords of `prompt`."""

    max_length: int | None
    max_new_tokens: int | None
    top_k: int | None
    top_p: float | None
    temperature: float | None
    num_return_sequences: int
    seed: int
    stream: Callable[[str], object] | None
    chat: bool
    device: str
    revision: str | None
    offline: bool
    progress: ProgressCallback | None


def prompt(
    query: str | Sequence[Mapping[str, str]],
    artifact: str | PathLike[str] | None = None,
    *,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float | None = None,
    num_return_sequences: int = 1,
    seed: int = 0,
    stream: Callable[[str], object] | None = None,
    chat: bool = True,
    device: str = "auto",
    revision: str | None = None,
    offline: bool = False,
    progress: ProgressCallback | None = None,
) -> list[str]:
    """Answers a query with a 4-bit model, which stays loaded for the next call.

    It runs in a process of its own, which ends with this one.

    Args:
        query: what to answer or to continue: a text, or a conversation as chat messages, such as
            [{"role": "system", "content": "…"}, {"role": "user", "content": "…"}].
        artifact: an artifact, a build, a plain checkpoint (quantized while loading) or a Hub id;
            None takes the newest build under ./artifacts.
        max_length: prompt and answer together, in tokens.
        max_new_tokens: of the answer, in tokens; 128 if neither is given.
        top_k: draw from the k likeliest tokens.
        top_p: draw from the likeliest tokens that make up this probability.
        temperature: of the draws; 0 is greedy. Without any of the three, answers are greedy unless
            several are asked for.
        num_return_sequences: how many answers.
        seed: of the draws; the same seed on the same machine gives the same answers.
        stream: called with each piece of the one answer as it comes.
        chat: put a text into the model's chat template, if it has one. Messages always go into it.
        device: "auto", "cpu", "cuda" or "cuda:N".
        revision: branch, tag or commit of a model on the Hub; None for its main branch.
        offline: take a model on the Hub as it is cached; HF_HUB_OFFLINE says so, too.
        progress: told how far a download and the loading are.

    Returns:
        The answers, `num_return_sequences` of them, without the query.

    Raises:
        UsageError: there is no such model, the query is empty or no query, messages were given
            although the model has no chat template, or a value is out of its range or does not go
            with another one.
        ArtifactError: the model or its tokenizer cannot be loaded, its chat template fails, or one
            of them takes more time or memory than any real one.
        SourceError: the folder holds no weights in safetensors, a file leads out of it or is not
            what its name says, or the config is not that of the weights.
        HubError: the Hub does not give the model, or not the bytes that it lists.
        ResourceError: this machine has no such device, or too little memory.
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
    with reporting_to(progress) as reporter:
        reply = ask(
            query,
            artifact,
            sampling,
            revision=revision,
            offline=offline,
            device=device,
            chat=chat,
            show=stream,
            reporter=reporter,
        )
    return [answer.text for answer in reply.answers]
