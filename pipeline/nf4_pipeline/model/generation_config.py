"""What answers follow of a checkpoint's generation_config.json: what ends them, and little more.

How long an answer is, how many there are and how each token is chosen is for whoever asks to say.
A stranger's `num_beams` or `cache_implementation` could take any amount of memory and time.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any, Final

_MOST_IDS: Final = 10_000
_LARGEST_ID: Final = 2**31 - 1


def plain_generation_config(found: Any) -> Any:
    """A transformers GenerationConfig with what is kept of another one.

    Args:
        found: as it was loaded; None if there is none.
    """
    from transformers import GenerationConfig

    values = {} if found is None else vars(found)
    return GenerationConfig(
        **{name: values[name] for name, fits in _KEPT.items() if fits(values.get(name))}
    )


def end_tokens(config: Any) -> frozenset[int]:
    """The tokens that end an answer.

    Args:
        config: from `plain_generation_config`.
    """
    ends = config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_ID


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= _MOST_IDS and all(map(_is_id, value))


def _is_number(low: float, high: float) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and isfinite(value)
        and low <= value <= high
    )


_KEPT: Final[dict[str, Callable[[object], bool]]] = {
    "bos_token_id": _is_id,
    "eos_token_id": lambda value: _is_id(value) or _are_ids(value),
    "pad_token_id": _is_id,
    "suppress_tokens": _are_ids,
    "begin_suppress_tokens": _are_ids,
    "repetition_penalty": _is_number(0.01, 100.0),
    "no_repeat_ngram_size": lambda value: _is_id(value) and _is_number(0, 1000)(value),
    "min_p": _is_number(0.0, 1.0),
    "typical_p": _is_number(0.01, 1.0),
}
