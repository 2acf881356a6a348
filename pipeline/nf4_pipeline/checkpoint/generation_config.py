"""generation_config.json of strangers, held against the types that transformers works with.

transformers takes this file as it is, and fails where a value is used, with an error of Python:
after a whole build, and for every user of the artifact. So it is looked at before any work.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.errors import CheckpointError

GENERATION_CONFIG: Final = "generation_config.json"

_MOST: Final = 2**31
_TOKENS: Final = 100_000
"""Token ids in one list, at most: no vocabulary has so many that are never wanted."""


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < _MOST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)


def _is_penalty(value: Any) -> bool:
    # Of whole numbers transformers takes only the one that changes nothing.
    return _is_number(value) and (value == 1 or (type(value) is float and value > 0))


def _is_token(value: Any) -> bool:
    return _is_whole(value) and value >= -1  # many configs say -1 for none


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _TOKENS and all(map(_is_token, value))


def _are_sequences(value: Any) -> bool:
    return isinstance(value, list) and all(_are_tokens(item) and item for item in value)


def _are_texts(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text for text in texts)


_WHOLE: Final = (
    "max_length max_new_tokens min_length min_new_tokens top_k num_beams num_beam_groups "
    "num_return_sequences no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "prompt_lookup_num_tokens max_matching_ngram_size num_assistant_tokens"
)
_NUMBERS: Final = (
    "temperature top_p min_p top_h typical_p epsilon_cutoff eta_cutoff length_penalty "
    "diversity_penalty guidance_scale max_time penalty_alpha assistant_confidence_threshold"
)
_SWITCHES: Final = (
    "do_sample use_cache renormalize_logits remove_invalid_values output_scores output_logits "
    "output_attentions output_hidden_states return_dict_in_generate low_memory token_healing"
)
_KINDS: Final[tuple[tuple[str, str, Callable[[Any], bool]], ...]] = (
    (_WHOLE, "a whole number", _is_whole),
    (_NUMBERS, "a number", _is_number),
    (_SWITCHES, "true or false", lambda value: type(value) is bool),
    (
        "repetition_penalty encoder_repetition_penalty",
        "a number above 0, such as 1.1",
        _is_penalty,
    ),
    (
        "eos_token_id forced_eos_token_id",
        "a token id or a list of them",
        lambda value: _is_token(value) or _are_tokens(value),
    ),
    ("bos_token_id pad_token_id forced_bos_token_id", "a token id", _is_token),
    ("suppress_tokens begin_suppress_tokens", "a list of token ids", _are_tokens),
    ("bad_words_ids", "a list of lists of token ids", _are_sequences),
    ("stop_strings", "a text or a list of texts, none of them empty", _are_texts),
)
_CHECKS: Final = {
    name: (expected, check) for names, expected, check in _KINDS for name in names.split()
}


def check_generation_config(config: dict[str, Any], path: Path) -> None:
    """Refuses values that no program could generate with; what it does not know it leaves alone.

    Args:
        config: the JSON object.
        path: of the file, for the message.

    Raises:
        CheckpointError: a value has another type than generating needs.
    """
    for name, (expected, check) in _CHECKS.items():
        value = config.get(name)
        if value is not None and not check(value):
            raise CheckpointError(
                f"{path} says {name} = {repr(value)[:80]}; expected {expected}. Nothing can "
                "generate with it: correct it there, or delete the entry."
            )
