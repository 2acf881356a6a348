"""The process that loads a model and answers prompts; see `prompt.py`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

from nf4_pipeline.errors import ArtifactError, PipelineError, ResourceError
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.progress import Reporter
from nf4_pipeline.runtime.generate import Generator
from nf4_pipeline.runtime.loader import load
from nf4_pipeline.runtime.prompt import WITHOUT_TEMPLATE, PromptReply, PromptRequest


def run(request: PromptRequest, reporter: Reporter) -> PromptReply:
    """Answers one prompt; what was loaded for the last one is used again.

    Raises:
        ArtifactError: the model or its tokenizer cannot be loaded, or fails.
        SourceError: the folder holds no model that may be loaded.
        ResourceError: this machine has no such device, or too little memory.
        UsageError: the prompt gives no token, or is too long.
    """
    with reporter.task("load the model", None):
        generator = _open(request.folder, request.device)
    try:
        with ExitStack() as waiting:
            waiting.enter_context(reporter.task("answer", None))
            streamer = None
            if request.streams:  # its first words end the waiting
                streamer = _streamer(generator.tokenizer, reporter, waiting.close)
            answers = generator.answer(
                request.query, request.sampling, chat=request.chat, streamer=streamer
            )
    except (PipelineError, MemoryError):
        raise
    except Exception as error:  # a stranger's config may make a model that does not run
        raise _failed(error, request.folder) from error
    finally:
        generator.tokenizer.renew()
    return PromptReply(tuple(answers), str(generator.model.device))


@lru_cache(maxsize=1)
def _open(folder: Path, device: str) -> Generator:
    tokenizer = LimitedTokenizer.open(folder, template_remedy=WITHOUT_TEMPLATE)
    return Generator(load(folder, device=device), tokenizer)


def _failed(error: Exception, folder: Path) -> PipelineError:
    import torch

    said = " ".join(str(error).split())[:300]
    if isinstance(error, torch.OutOfMemoryError):
        return ResourceError(
            f"The memory of the device is too small for {folder}: {said} Ask for a shorter answer, "
            "or for fewer at a time."
        )
    return ArtifactError(f"The model of {folder} does not run: {type(error).__name__}: {said}")


def _streamer(tokenizer: LimitedTokenizer, reporter: Reporter, begin: Callable[[], None]) -> Any:
    """Passes words on as they come; `begin` is called before."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            begin()
            reporter.note(text)

    return Streamer(tokenizer, skip_prompt=True)
