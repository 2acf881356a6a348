"""Names against patterns: as a regular expression would have it, and never for long."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nf4_pipeline.model.name_patterns import fits
from nf4_pipeline.model.unused_tensors import matches
from nf4_pipeline.selection import skips

PATTERNS = st.text("ab.*", max_size=8)
NAMES = st.text("ab.", max_size=12)


@settings(max_examples=1_000)
@given(PATTERNS, NAMES)
def test_as_a_regular_expression(pattern: str, name: str) -> None:
    any_of = [re.escape(part) for part in pattern.split("*")]
    assert fits(pattern, name) == bool(re.fullmatch(".*".join(any_of), name))
    assert fits(pattern, name, least=1) == bool(re.fullmatch(".+".join(any_of), name))
    assert matches(pattern, name) == bool(re.fullmatch(".*".join(any_of) + r"(\..*)?", name))
    parts = r"\.".join(re.escape(p).replace(r"\*", "[^.]+") for p in pattern.split("."))
    whole = all(name.split("."))
    if whole and all(pattern.split(".")):
        assert skips(pattern, name) == bool(re.search(rf"(?:^|\.){parts}(?:\.|$)", name))


@pytest.mark.parametrize(
    "pattern", ["*a" * 500 + "b", "*" * 1_000 + "b", "a*" * 500 + "b", "*.a*b"]
)
@pytest.mark.parametrize("name", ["a" * 1_024, "a." * 512 + "a", ".".join(["a" * 31] * 32)])
def test_names_made_to_take_long(pattern: str, name: str) -> None:
    assert not matches(pattern, name)
    assert not skips(pattern, name)
