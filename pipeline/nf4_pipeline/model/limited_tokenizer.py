"""A tokenizer and its chat template, which are a stranger's programs: run within limits.

A replacement may multiply a text, a pattern may take for ever, a template is a whole language. So
every call is a phase (`processes/phase.py`), all calls share a budget of time, and what comes back
is held against what went in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from nf4_pipeline.checkpoint.files import is_tokenizer
from nf4_pipeline.errors import ArtifactError, PipelineError
from nf4_pipeline.processes.phase import PhaseLimits, limited
from nf4_pipeline.quiet_libraries import quiet_loading

T = TypeVar("T")

_BRING: Final = "Bring it from where the model came from."

_SECONDS: Final = 10.0
"""For loading it and for all that is asked of it, beyond what follows."""
_SECONDS_A_CALL: Final = 0.05
_BYTES_A_SECOND: Final = 100_000
"""Of text; the slowest real tokenizers read ten times as fast."""
_FILE_BYTES_A_SECOND: Final = 20_000_000
_IDS_A_SECOND: Final = 20_000
_DATA_BYTES: Final = 2**30
"""Of memory, beyond what the process has; a real tokenizer of 35 MB takes half of it."""

_READ_WHOLE: Final = 2**20
"""Characters of a text that it gets in one go: some hundred bytes of memory for each."""
_PLACE: Final = 16
"""Characters of a place for each token that is wanted of it."""

_TOKENS_A_BYTE: Final = 32
"""The longest that Unicode itself makes of three bytes are 33, in 18 characters."""
_FREE_TOKENS: Final = 10_000
_CHARACTERS_A_TOKEN: Final = 1024
_FREE_CHARACTERS: Final = 1_000_000

_TEMPLATE_REMEDY: Final = "Take it out of the tokenizer's files, or bring another one."
_TOKENIZER_REMEDY: Final = "Bring its files again from where the model came from."


class LimitedTokenizer:
    """A transformers tokenizer, asked within limits.

    Args:
        tokenizer: it.
        error: of the project; raised for whatever goes wrong in it.
        seconds: that all calls together may take, beyond what their texts allow.
        template_remedy: a sentence that says how to do without the chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        error: type[PipelineError] = ArtifactError,
        seconds: float = _SECONDS,
        template_remedy: str = _TEMPLATE_REMEDY,
    ) -> None:
        self.tokenizer = tokenizer
        self._template_remedy = template_remedy
        self._error = error
        self._seconds = seconds

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        error: type[PipelineError] = ArtifactError,
        template_remedy: str = _TEMPLATE_REMEDY,
    ) -> LimitedTokenizer:
        """Loads the tokenizer of a model.

        Args:
            folder: of the model; its files were looked at (`check_folder.py`).
            error: as above.
            template_remedy: as above.

        Raises:
            PipelineError: (`error`) the tokenizer does not load within its limits.
        """
        from transformers import AutoTokenizer

        seconds = _SECONDS + _small_bytes(folder) / _FILE_BYTES_A_SECOND
        start = time.thread_time()
        try:
            with (
                limited(f"the tokenizer of {folder}", _limits(seconds), _TOKENIZER_REMEDY, error),
                quiet_loading(),
            ):
                tokenizer = AutoTokenizer.from_pretrained(
                    str(folder), trust_remote_code=False, local_files_only=True
                )
        except error as failure:
            names = {path.name for path in folder.iterdir()}
            if any(is_tokenizer(name) for name in names):
                raise
            raise error(f"{no_tokenizer(folder, names)} {_BRING}") from failure
        left = seconds - (time.thread_time() - start)
        return cls(tokenizer, error=error, seconds=left, template_remedy=template_remedy)

    def renew(self) -> None:
        """Gives all later calls together as much time as a new one has."""
        self._seconds = _SECONDS

    @property
    def where(self) -> str:
        """The folder that it is from."""
        return str(getattr(self.tokenizer, "name_or_path", "") or "the model")

    @property
    def has_template(self) -> bool:
        """True if it has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def special_id(self, name: str) -> int | None:
        """The id of a special token, such as "eos_token_id"; None if it has none."""
        value = getattr(self.tokenizer, name, None)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def size(self) -> int:
        """How many tokens it knows; 0 if it does not say."""
        try:
            return len(self.tokenizer)
        except Exception:  # a stranger's code
            return 0

    def ids(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens of a text.

        Args:
            text: it.
            special: with those that the tokenizer puts around a text of its own accord.

        Raises:
            PipelineError: (of the constructor) the tokenizer fails, or makes far more tokens than
                the text has characters.
        """
        size = len(text.encode("utf-8", "surrogatepass"))
        found: list[int] = self._run(
            lambda: self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids,
            size / _BYTES_A_SECOND,
            "the tokenizer",
        )
        if len(found) > _FREE_TOKENS + _TOKENS_A_BYTE * size:
            raise self._error(
                f"The tokenizer of {self.where} makes {len(found):,} tokens of {size:,} bytes of "
                f"text, which no real one does. {_TOKENIZER_REMEDY}"
            )
        return found

    def ids_all_over(self, text: str, places: int, room: int) -> list[int]:
        """The tokens of a text, or of a long one those of places that are spread evenly over it.

        Args:
            text: it.
            places: how many.
            room: tokens of each place; one that has fewer is left out.

        Raises:
            PipelineError: (of the constructor) the tokenizer fails, or makes far more tokens than
                the text has characters.
        """
        if len(text) <= _READ_WHOLE:
            return self.ids(text)
        size = min(room * _PLACE, len(text))
        found: list[int] = []
        for number in range(places):
            start = (len(text) - size) * number // max(1, places - 1)
            piece = text[start : start + size]
            # What begins in the middle of a word goes up to the next one.
            ids = self.ids(piece[piece.find(" ") + 1 :] if start else piece)[:room]
            found += ids if len(ids) == room else []
        return found

    def prefix(self) -> list[int]:
        """The ids that it puts before a text; what it may put behind one is left out."""
        bare, whole = self.ids("a"), self.ids("a", special=True)
        starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[: next(starts, 0)]

    def in_template(
        self, messages: Sequence[Any], *, answer_follows: bool, remedy: str | None = None
    ) -> str:
        """A conversation as the chat template writes it.

        Args:
            messages: of it.
            answer_follows: with what stands before an answer.
            remedy: a sentence that says what to do if it fails; None for that of the tokenizer.

        Raises:
            PipelineError: (of the constructor) the chat template fails, or writes far more than the
                conversation holds.
        """
        remedy = remedy or self._template_remedy
        size = sum(len(str(message)) for message in messages)
        text = self._run(
            lambda: self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer_follows
            ),
            size / _BYTES_A_SECOND,
            "the chat template",
            remedy,
        )
        if not isinstance(text, str) or len(text) > _FREE_CHARACTERS + 16 * size:
            raise self._error(
                f"The chat template of {self.where} writes {len(text):,} characters for a "
                f"conversation of {size:,}, which no real one does. {remedy}"
            )
        return text

    def decode(self, ids: Sequence[int], **_: object) -> str:
        """The text of tokens, without special ones; a streamer of transformers may call it.

        Raises:
            PipelineError: (of the constructor) the tokenizer fails, or writes far more than so many
                tokens stand for.
        """
        numbers = [int(number) for number in ids]
        text: str = self._run(
            lambda: self.tokenizer.decode(numbers, skip_special_tokens=True),
            len(numbers) / _IDS_A_SECOND,
            "the tokenizer",
        )
        if len(text) > _FREE_CHARACTERS + _CHARACTERS_A_TOKEN * len(numbers):
            raise self._error(
                f"The tokenizer of {self.where} makes {len(text):,} characters of "
                f"{len(numbers):,} tokens, which no real one does. {_TOKENIZER_REMEDY}"
            )
        return text

    def _run(
        self, call: Callable[[], T], seconds: float, what: str, remedy: str = _TOKENIZER_REMEDY
    ) -> T:
        """Calls it within what is left of the budget, and takes from the budget what it took."""
        allowed = seconds + _SECONDS_A_CALL
        budget = max(0.0, self._seconds) + allowed
        start = time.thread_time()
        try:
            with limited(f"{what} of {self.where}", _limits(budget), remedy, self._error):
                return call()
        finally:
            self._seconds -= max(0.0, time.thread_time() - start - allowed)


def no_tokenizer(folder: Path, names: Collection[str]) -> str:
    """That no file is there from which a tokenizer could be made.

    Args:
        folder: of the model.
        names: of all files in it.
    """
    beside = " beside its tokenizer_config.json" if "tokenizer_config.json" in names else " in it"
    return (
        f"{folder} has no tokenizer: expected tokenizer.json, tokenizer.model or a vocabulary"
        f"{beside}."
    )


def _limits(seconds: float) -> PhaseLimits:
    return PhaseLimits(seconds, _DATA_BYTES)


def _small_bytes(folder: Path) -> int:
    """Bytes of what a tokenizer can be made of."""
    return sum(
        path.stat().st_size
        for path in folder.iterdir()
        if path.is_file() and path.suffix not in (".safetensors", ".bin")
    )
