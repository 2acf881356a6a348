"""Text in, text out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.errors import ArtifactError, PipelineError, ResourceError, UsageError
from nf4_pipeline.library_output import quiet_loading
from nf4_pipeline.runtime.artifact import find_model
from nf4_pipeline.runtime.loader import load, load_tokenizer, pick_device

_MOST: Final = 2**31 - 1
_MOST_ANSWERS: Final = 1_000
"""Answers to one prompt, which are computed at once."""

DEFAULT_NEW_TOKENS: Final = 128
"""Length of an answer when neither its own nor the whole length is given."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Greedy, unless something here asks for chance.

    Attributes:
        max_length: prompt and answer together, in tokens; None leaves it to `max_new_tokens`.
        max_new_tokens: of the answer, in tokens.
        top_k: only the k likeliest tokens are drawn from; None for no limit.
        top_p: only the likeliest tokens whose probabilities add up to p are drawn from.
        temperature: logits are divided by it before drawing; 0 is greedy.
        num_return_sequences: answers to one prompt.
        seed: of the draws; the same seed on the same machine gives the same answers.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    temperature: float | None = None
    num_return_sequences: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_length", "max_new_tokens", "top_k", "num_return_sequences"):
            value, most = getattr(self, name), _MOST_ANSWERS if name[0] == "n" else _MOST
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; expected at least 1.")
            if value is not None and value > most:
                raise UsageError(f"{name} is {value:.3g}; expected at most {most:,}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; expected more than 0 and at most 1.")
        if self.temperature and not 1e-6 <= self.temperature <= 1e6:
            raise UsageError(
                f"temperature is {self.temperature}; expected 0, or from 0.000001 to 1,000,000."
            )
        if not -(2**63) <= self.seed < 2**64:
            raise UsageError(f"seed is {self.seed:.3g}; expected from -2^63 to 2^64 - 1.")
        if self.temperature == 0 and self.num_return_sequences > 1:
            raise UsageError("temperature 0 gives one answer only; raise it to ask for several.")

    @property
    def draws(self) -> bool:
        """True if answers depend on chance."""
        if self.temperature == 0:
            return False
        asked = (self.top_k, self.top_p, self.temperature)
        return self.num_return_sequences > 1 or any(value is not None for value in asked)


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a prompt.

    Attributes:
        text: without the prompt and without special tokens.
        ids: the tokens that were written, the one that ended them included.
        seconds: from the prompt to the last token (of all answers to it).
    """

    text: str
    ids: tuple[int, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        """How many were written."""
        return len(self.ids)


class Generator:
    """A model with its tokenizer.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer.
        device: where its inputs go; None for where the model says it is.
    """

    def __init__(self, model: Any, tokenizer: Any, device: Any = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = device or model.device

    @classmethod
    def open(
        cls, artifact: str | Path | None = None, *, device: str = "auto", quantize: bool = True
    ) -> Generator:
        """Loads both; see `nf4_pipeline.runtime.loader.load`."""
        return cls(load(artifact, device=device, quantize=quantize), load_tokenizer(artifact))

    @property
    def context(self) -> int | None:
        """How many tokens the model was built for, if its config says so."""
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def encode(self, query: str, *, chat: bool = False) -> Any:
        """Token ids of a prompt, int64 [1, length] on the device.

        Args:
            query: the text.
            chat: put it into the model's chat template, if it has one.
        """
        if not query.strip():
            raise UsageError("The prompt is empty. Give at least one word.")
        if not _is_utf8(query):
            raise UsageError("The prompt is not UTF-8. Give it in that encoding.")
        templated = chat and bool(getattr(self.tokenizer, "chat_template", None))
        if templated:
            query = self._in_template(query)
        try:
            # A template writes its special tokens itself.
            ids = self.tokenizer(
                query, return_tensors="pt", add_special_tokens=not templated
            ).input_ids
        except Exception as error:  # tokenizers of strangers fail in any way they like
            raise ArtifactError(
                f"The model's tokenizer fails on this prompt: {_brief(error)}. Bring its files "
                "again from where the model came from."
            ) from error
        if ids.shape[1] == 0:
            raise UsageError("The tokenizer makes no token of this prompt. Give another one.")
        return ids.to(self.device)

    def _in_template(self, query: str) -> str:
        messages = [{"role": "user", "content": query}]
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program of whoever made the model
            raise ArtifactError(
                f"The model's chat template fails: {error}. Leave it out (--raw, or chat=False)."
            ) from error
        return text

    def answer(
        self, query: str, sampling: Sampling, *, chat: bool = False, streamer: Any = None
    ) -> list[Answer]:
        """Continues a prompt.

        Args:
            query: the prompt.
            sampling: how tokens are chosen.
            chat: put the prompt into the model's chat template, if it has one.
            streamer: a transformers streamer that sees tokens as they come.

        Raises:
            UsageError: the prompt is empty or gives no token, or is already as long as
                `max_length` or the model's context.
            ArtifactError: the chat template or the tokenizer fails, or the model does.
            ResourceError: memory runs out.
        """
        import torch

        ids = self.encode(query, chat=chat)
        start = time.perf_counter()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.inference_mode(), quiet_loading():
            torch.manual_seed(sampling.seed)
            options = self._options(ids.shape[1], sampling)
            try:
                written = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=streamer,
                    tokenizer=self.tokenizer,  # for the stop strings of a generation config
                    **options,
                )
            except Exception as error:  # a stranger's configs fail in any way they like
                raise _of_generating(error) from error
        seconds = time.perf_counter() - start
        answers = []
        for sequence in written:
            new = [int(t) for t in sequence[ids.shape[1] :]]
            end = self._end(new)
            text = self.tokenizer.decode(new[:end], skip_special_tokens=True)
            answers.append(Answer(text, tuple(new[: end + 1]), seconds))
        return answers

    def _end(self, tokens: Sequence[int]) -> int:
        """Where the first end-of-text stands: what follows it only pads the batch."""
        ends = self.model.generation_config.eos_token_id
        stops = ends if isinstance(ends, list | tuple) else (ends,)
        return next((i for i, token in enumerate(tokens) if token in stops), len(tokens))

    def _options(self, prompt_tokens: int, sampling: Sampling) -> dict[str, int | float | None]:
        limit = sampling.max_new_tokens
        if sampling.max_length is not None:
            room = sampling.max_length - prompt_tokens
            if room < 1:
                raise UsageError(
                    f"max_length is {sampling.max_length}, but the prompt alone has "
                    f"{prompt_tokens} tokens. Raise it, or use max_new_tokens."
                )
            limit = room if limit is None else min(limit, room)
        limit = limit or DEFAULT_NEW_TOKENS
        if self.context is not None:
            if prompt_tokens >= self.context:
                raise UsageError(
                    f"The prompt has {prompt_tokens} tokens, and this model takes {self.context} "
                    "in all. Shorten it."
                )
            limit = min(limit, self.context - prompt_tokens)
        options: dict[str, int | float | None] = {
            "max_new_tokens": limit,
            "num_beams": 1,
            "return_dict_in_generate": False,
            "num_return_sequences": sampling.num_return_sequences,
            "do_sample": sampling.draws,
            "pad_token_id": self._pad_token(),
        }
        if sampling.draws:
            options["top_k"] = sampling.top_k or 0
            options["top_p"] = sampling.top_p or 1.0
            options["temperature"] = sampling.temperature or 1.0
        return options

    def _pad_token(self) -> int | None:
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else self.tokenizer.eos_token_id


def _of_generating(error: Exception) -> PipelineError:
    """What transformers or torch raised while a model generated, as an error of ours."""
    text = _brief(error)
    if isinstance(error, MemoryError) or "memory" in text.lower():
        return ResourceError(
            f"Memory ran out while the model generated: {text}. Ask for fewer or shorter answers."
        )
    return ArtifactError(
        f"The model does not generate: {text}. Look at its config.json and "
        "generation_config.json: transformers does as they say."
    )


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@lru_cache(maxsize=1)
def _open_generator(folder: str, device: str) -> Generator:
    return Generator.open(folder, device=device)


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
    """Answers a query with a 4-bit model. The model stays loaded for the next call.

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
        ArtifactError: the model or its tokenizer cannot be loaded, or its chat template fails.
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
    generator = _open_generator(find_model(artifact), pick_device(device))
    return [answer.text for answer in generator.answer(query, sampling, chat=chat)]
