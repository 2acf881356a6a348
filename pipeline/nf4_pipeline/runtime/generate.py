"""Text in, text out."""

from __future__ import annotations

import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from nf4_pipeline.documents import Document
from nf4_pipeline.errors import ArtifactError, PipelineError, ResourceError, UsageError
from nf4_pipeline.model.generation_config import end_tokens, plain_generation_config
from nf4_pipeline.model.limited_tokenizer import LimitedTokenizer
from nf4_pipeline.quiet_libraries import quiet_loading
from nf4_pipeline.runtime.determinism import deterministic_on_gpu

_LIMITS: Final = {
    "max_length": 2**31 - 1,
    "max_new_tokens": 2**31 - 1,
    "top_k": 2**31 - 1,
    "num_return_sequences": 1_000,  # they are computed at once
}

DEFAULT_NEW_TOKENS: Final = 128
"""Length of an answer when neither its own nor the whole length is given."""


_MESSAGES_REMEDY: Final = (
    "Look at the messages: many templates want user and assistant in turn, and some take no "
    "system message."
)


@dataclass(frozen=True)
class Message(Document):
    """One message of a conversation.

    Attributes:
        role: who says it, such as "system", "user" or "assistant".
        content: what is said.
    """

    role: str
    content: str


Query = str | tuple[Message, ...]
"""What a model answers: a text, or a conversation."""


def parse_query(query: str | Sequence[Mapping[str, str]]) -> Query:
    """A text, or chat messages as transformers takes them, as a query.

    Raises:
        UsageError: the query is neither, or a conversation that leaves nothing to answer.
    """
    if isinstance(query, str):
        return query
    expected = 'a text, or messages such as [{"role": "user", "content": "Hello"}]'
    if isinstance(query, Mapping) or not isinstance(query, Sequence) or isinstance(query, bytes):
        raise UsageError(f"The prompt is a {type(query).__name__}; expected {expected}.")
    messages = []
    for number, message in enumerate(query):
        if not isinstance(message, Mapping):
            raise UsageError(
                f"The prompt is a list, and its entry {number} is {_shown(message)}; expected "
                f"{expected}. For several prompts, call it once for each: the model stays loaded."
            )
        if set(message) != {"role", "content"} or not all(
            isinstance(value, str) for value in message.values()
        ):
            raise UsageError(
                f"Message {number} is {_shown(dict(message))}; expected a dict of two texts, "
                '"role" and "content".'
            )
        messages.append(Message(message["role"], message["content"]))
    if not messages:
        raise UsageError(f"The prompt is an empty list; expected {expected}.")
    if messages[-1].role == "assistant":
        raise UsageError(
            "The last message is the assistant's, so that nothing is left to answer. End with "
            "another one, such as the user's."
        )
    return tuple(messages)


@dataclass(frozen=True)
class Sampling(Document):
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
        for name, most in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise UsageError(f"{name} is {value!r}; expected a whole number.")
            if value is not None and value > most:
                raise UsageError(f"{name} is {_whole(value)}; expected at most {most:,}.")
            if value is not None and value < 1:
                raise UsageError(f"{name} is {_whole(value)}; expected at least 1.")
        for name in ("top_p", "temperature", "seed"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int if name == "seed" else (int, float)):
                raise UsageError(f"{name} is {value!r}; expected a number.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            said = f"top_p is {self.top_p}; expected more than 0 and at most 1."
            if 2 <= self.top_p < 100:
                said += f" {self.top_p:g} % is {self.top_p / 100:g}."
            raise UsageError(said)
        if self.temperature and not 1e-6 <= self.temperature <= 1e6:
            raise UsageError(
                f"temperature is {self.temperature}; expected 0, or from 0.000001 to 1,000,000."
            )
        if not -(2**63) <= self.seed < 2**64:
            raise UsageError("The seed is out of range; expected from -2^63 to 2^64 - 1.")
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
class Answer(Document):
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
        model: a transformers causal LM; what its generation config may say is narrowed.
        tokenizer: its tokenizer.
        device: where its inputs go; None for where the model says it is.
    """

    def __init__(self, model: Any, tokenizer: LimitedTokenizer, device: Any = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device = device or model.device
        model.generation_config = plain_generation_config(model.generation_config)

    @property
    def context(self) -> int | None:
        """How many tokens the model was built for, if its config says so."""
        return context_of(self.model)

    def encode(self, query: Query, *, chat: bool = False) -> Any:
        """Token ids of a prompt, int64 [1, length] on the device.

        Args:
            query: a text, or a conversation, which always goes into the chat template.
            chat: put a text into the model's chat template, too, if it has one.

        Raises:
            UsageError: the prompt is empty or gives no token, or is a conversation although the
                model has no chat template.
            ArtifactError: the chat template or the tokenizer fails, or makes a token that the model
                does not know.
        """
        import torch

        said = query if isinstance(query, str) else "".join(m.content for m in query)
        if not said.strip():
            raise UsageError("The prompt is empty. Give at least one word.")
        if not _is_utf8(said):
            raise UsageError("The prompt is not UTF-8. Give it in that encoding.")
        text, templated = self._in_template(query, chat)
        # A template writes its special tokens itself.
        ids = self.tokenizer.ids(text, special=not templated)
        if not ids:
            raise UsageError("The tokenizer makes no token of this prompt. Give another one.")
        known = self.model.get_input_embeddings().weight.shape[0]
        if not 0 <= min(ids) <= max(ids) < known:
            raise ArtifactError(
                f"The tokenizer of {self.tokenizer.where} makes the token {max(ids)} of this "
                f"prompt, and the model knows {known:,}. It is another model's."
            )
        return torch.tensor([ids], dtype=torch.int64).to(self.device)

    def _in_template(self, query: Query, chat: bool) -> tuple[str, bool]:
        """The text of a query, and whether the chat template wrote it."""
        if isinstance(query, str):
            if not (chat and self.tokenizer.has_template):
                return query, False
            messages = [{"role": "user", "content": query}]
            return self.tokenizer.in_template(messages, answer_follows=True), True
        if not self.tokenizer.has_template:
            raise UsageError(
                f"The tokenizer of {self.tokenizer.where} has no chat template, so that messages "
                "mean nothing to it. Give the prompt as one text."
            )
        messages = [message.to_json() for message in query]
        text = self.tokenizer.in_template(messages, answer_follows=True, remedy=_MESSAGES_REMEDY)
        return text, True

    def answer(
        self, query: Query, sampling: Sampling, *, chat: bool = False, streamer: Any = None
    ) -> list[Answer]:
        """Continues a prompt.

        Args:
            query: the prompt.
            sampling: how tokens are chosen.
            chat: as in `encode`.
            streamer: a transformers streamer that sees tokens as they come.

        Raises:
            UsageError: the prompt is empty or gives no token, is a conversation although the model
                has no chat template, or is already as long as `max_length` or the model's context.
            ArtifactError: the chat template or the tokenizer fails, or the model does.
            ResourceError: memory runs out.
        """
        import torch

        ids = self.encode(query, chat=chat)
        start = time.perf_counter()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(sampling.seed)
            written = self.write(
                ids, torch.ones_like(ids), streamer, **self._options(ids.shape[1], sampling)
            )
        seconds = time.perf_counter() - start
        return [Answer(self.text(new), new, seconds) for new in written]

    def write(
        self, ids: Any, mask: Any, streamer: Any = None, **options: Any
    ) -> list[tuple[int, ...]]:
        """Continues sequences of tokens.

        Args:
            ids: int64 [sequences, length] on the device.
            mask: int64 like it; 0 where a sequence is only padded.
            streamer: a transformers streamer that sees tokens as they come.
            options: of transformers' `generate`.

        Returns:
            What was written after each, up to the token that ended it, which is there, too.

        Raises:
            ArtifactError: transformers or torch refuses to generate.
            ResourceError: memory ran out while the model generated.
        """
        import torch

        with torch.inference_mode(), deterministic_on_gpu(self.device), quiet_loading():
            try:
                written = self.model.generate(
                    ids,
                    attention_mask=mask,
                    streamer=streamer,
                    num_beams=1,
                    return_dict_in_generate=False,
                    pad_token_id=self._pad_token(),
                    **options,
                )
            except PipelineError:
                raise
            except Exception as error:  # a stranger's configs fail in any way they like
                raise _of_generating(error) from error
        stops = end_tokens(self.model.generation_config)
        return [_to_end(sequence[ids.shape[1] :].tolist(), stops) for sequence in written]

    def text(self, tokens: Sequence[int]) -> str:
        """The text of an answer, without the token that ended it.

        Raises:
            ArtifactError: the tokenizer fails.
        """
        ended = bool(tokens) and tokens[-1] in end_tokens(self.model.generation_config)
        return self.tokenizer.decode(list(tokens[: -1 if ended else None]))

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
            "num_return_sequences": sampling.num_return_sequences,
            "do_sample": sampling.draws,
        }
        if sampling.draws:
            options["top_k"] = sampling.top_k or 0
            options["top_p"] = sampling.top_p or 1.0
            options["temperature"] = sampling.temperature or 1.0
        return options

    def _pad_token(self) -> int | None:
        pad = self.tokenizer.special_id("pad_token_id")
        return pad if pad is not None else self.tokenizer.special_id("eos_token_id")


def _to_end(tokens: Sequence[int], stops: Container[int]) -> tuple[int, ...]:
    """Tokens up to the first that ends a text: what follows it only pads the batch."""
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tuple(tokens[: end + 1])


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


def _whole(value: int) -> str:
    """A number for a message; Python writes none of more than 4,300 digits."""
    return f"{value:,}" if abs(value) < 10**12 else "a number beyond all"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def context_of(model: Any) -> int | None:
    """How many tokens a model was built for, if its config says so.

    Args:
        model: a transformers causal LM.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
