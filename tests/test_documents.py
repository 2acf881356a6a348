"""Documents come back as they were, and wrong shapes are named by their place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.documents import Document, DocumentError, key, optional


@dataclass(frozen=True, slots=True, kw_only=True)
class Part(Document):
    name: str
    shape: tuple[int, ...]
    error: float
    note: str | None = optional()


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole(Document):
    kind: Literal["a", "b", 1]
    good: bool
    parts: tuple[Part, ...]
    by_name: dict[str, Part]
    counts: Mapping[str, int]
    where: Path
    commit: str | None
    in_16_bit: int = field(metadata=key("16bit"))
    part: Part | None = optional()
    in_8_bit: int | None = optional("8bit")
    seed: int | tuple[int, ...] = 0
    foreign: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Strict(Document):
    refuse_unknown_keys: ClassVar[bool] = True
    name: str


numbers = st.integers() | st.floats(allow_nan=False)
parts = st.builds(
    Part,
    name=st.text(),
    shape=st.lists(st.integers()).map(tuple),
    error=numbers,
    note=st.none() | st.text(),
)
wholes = st.builds(
    Whole,
    kind=st.sampled_from(["a", "b", 1]),
    good=st.booleans(),
    parts=st.lists(parts, max_size=3).map(tuple),
    by_name=st.dictionaries(st.text(), parts, max_size=3),
    counts=st.dictionaries(st.text(), st.integers()),
    where=st.sampled_from([Path("a/b"), Path("/x"), Path()]),
    commit=st.none() | st.text(),
    in_16_bit=st.integers(),
    part=st.none() | parts,
    in_8_bit=st.none() | st.integers(),
    seed=st.integers() | st.lists(st.integers()).map(tuple),
    foreign=st.dictionaries(st.text(), st.none() | st.lists(numbers)),
)


@given(wholes)
def test_a_document_comes_back_as_it_was(document: Whole) -> None:
    text = json.dumps(document.to_json())
    again = Whole.from_json(json.loads(text))
    assert again == document
    assert json.dumps(again.to_json()) == text


def test_keys_stand_in_the_order_of_the_fields() -> None:
    part = Part.from_json({"error": 1, "shape": [2], "name": "w"})
    assert json.dumps(part.to_json()) == '{"name": "w", "shape": [2], "error": 1}'


def test_an_optional_field_is_left_out_and_a_nullable_one_is_not() -> None:
    whole = Whole(
        kind="a",
        good=True,
        parts=(),
        by_name={},
        counts={},
        where=Path("x"),
        commit=None,
        in_16_bit=3,
    ).to_json()
    assert "part" not in whole
    assert "8bit" not in whole
    assert whole["commit"] is None
    assert whole["16bit"] == 3


GOOD: dict[str, Any] = {
    "kind": "a",
    "good": True,
    "parts": [{"name": "w", "shape": [1, 2], "error": 0.5}],
    "by_name": {},
    "counts": {},
    "where": "x",
    "commit": None,
    "16bit": 1,
}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"kind": "c"}, r"^kind: expected one of 'a', 'b', 1, got 'c'"),
    ({"kind": True}, r"^kind: expected one of .*, got True"),
    ({"good": 1}, r"^good: expected true or false, got 1"),
    ({"16bit": True}, r"^16bit: expected an integer, got True"),
    ({"16bit": 1.0}, r"^16bit: expected an integer, got 1.0"),
    ({"commit": 3}, r"^commit: expected a string or null, got 3"),
    ({"where": None}, r"^where: expected a string, got null"),
    ({"parts": {}}, r"^parts: expected a list, got an object"),
    ({"parts": [*GOOD["parts"], []]}, r"^parts\[1\]: expected an object, got a list"),
    ({"parts": [{"name": "w", "shape": 3}]}, r"^parts\[0\].shape: expected a list, got 3"),
    ({"parts": [{"name": "w", "shape": [3]}]}, r"^parts\[0\].error: expected a number, got noth"),
    ({"parts": [{"name": "w", "shape": [3, "x"]}]}, r"^parts\[0\].shape\[1\]: expected an integer"),
    ({"by_name": {"q.w": 1}}, r"^by_name\['q.w'\]: expected an object, got 1"),
    ({"by_name": []}, r"^by_name: expected an object, got a list"),
    ({"part": {"name": 1}}, r"^part.name: expected a string, got 1"),
    ({"seed": "x"}, r"^seed: expected an integer or a list, got 'x'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_wrong_shape_is_named_by_its_place(change: dict[str, Any], message: str) -> None:
    Whole.from_json(GOOD)
    with pytest.raises(DocumentError, match=message):
        Whole.from_json(GOOD | change)


def test_no_object_at_all() -> None:
    with pytest.raises(DocumentError, match=r"^top level: expected an object, got a list"):
        Part.from_json([])


def test_unknown_keys_are_ignored_or_refused() -> None:
    assert Whole.from_json(GOOD | {"new": 1}) == Whole.from_json(GOOD)
    with pytest.raises(DocumentError, match=r"^new: unknown key"):
        Strict.from_json({"name": "x", "new": 1})


def test_a_hint_that_no_document_may_have() -> None:
    @dataclass(frozen=True)
    class Odd(Document):
        things: list[int]

    with pytest.raises(TypeError, match="no document may have a field"):
        Odd.from_json({"things": []})
