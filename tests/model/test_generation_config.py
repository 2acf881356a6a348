"""What a checkpoint says of answers: what ends them is kept, what could harm is not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.model.generation_config import end_tokens, plain_generation_config
from transformers import GenerationConfig

KEPT = {
    "eos_token_id": [3, 5],
    "bos_token_id": 1,
    "pad_token_id": 0,
    "repetition_penalty": 1.2,
    "suppress_tokens": [7],
    "min_p": 0.1,
}


def found(**values: Any) -> GenerationConfig:
    """As `from_pretrained` leaves it, whatever the values are."""
    config = GenerationConfig()
    for name, value in values.items():
        setattr(config, name, value)
    return config


def test_what_ends_answers_is_kept() -> None:
    plain = plain_generation_config(found(**KEPT))
    assert {name: getattr(plain, name) for name in KEPT} == KEPT
    assert end_tokens(plain) == {3, 5}
    assert end_tokens(plain_generation_config(None)) == frozenset()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_length", 10**12),
        ("max_new_tokens", 10**12),
        ("min_length", 10**12),
        ("num_beams", 10**6),
        ("num_return_sequences", 10**6),
        ("num_beam_groups", 10**6),
        ("prompt_lookup_num_tokens", 10**9),
        ("guidance_scale", 1e9),
        ("cache_implementation", "static"),
        ("penalty_alpha", 0.5),
        ("dola_layers", "high"),
        ("stop_strings", ["x" * 10**6]),
        ("bad_words_ids", [[1]] * 10**5),
        ("sequence_bias", {(1,): 1e30}),
        ("watermarking_config", {"greenlist_ratio": 9}),
        ("assistant_early_exit", 10**9),
        ("custom_generate", "some/repo"),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [[3]]),
        ("eos_token_id", -1),
        ("eos_token_id", 2**70),
        ("eos_token_id", list(range(10**5))),
        ("eos_token_id", []),
        ("eos_token_id", True),
        ("eos_token_id", {"a": 1}),
        ("repetition_penalty", float("nan")),
        ("repetition_penalty", 0),
        ("repetition_penalty", "1.2"),
        ("no_repeat_ngram_size", 10**9),
        ("suppress_tokens", [1.5]),
    ],
)
def test_what_could_harm_is_not(name: str, value: Any) -> None:
    plain = plain_generation_config(found(**{name: value}))
    assert getattr(plain, name, None) == getattr(GenerationConfig(), name, None)
    assert end_tokens(plain) == frozenset()


@given(
    st.dictionaries(
        st.sampled_from([*KEPT, "num_beams", "max_length", "temperature", "typical_p"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ),
    )
)
def test_whatever_stands_there(values: dict[str, Any]) -> None:
    plain = plain_generation_config(found(**values))
    assert all(isinstance(token, int) and token >= 0 for token in end_tokens(plain))
    assert (plain.num_beams or 1, plain.max_length) in [(1, None), (1, 20)]
