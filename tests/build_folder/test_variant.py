"""The tag of a recipe: one for what shapes the bytes, none for what does not, safe as a name."""

from __future__ import annotations

import re
import string
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nf4_pipeline.build_folder.variant import (
    Variant,
    choose_folder,
    folder_name,
    split_name,
    without_hash,
)
from nf4_pipeline.recipe import QuantizeRecipe, Recipe, RecipeTable, SerializeRecipe, VerifyRecipe

BASE = "org--name@0123456789ab"

names = st.text(string.ascii_letters + ".*_ü☃/", min_size=1, max_size=8).filter(
    lambda text: bool(text.strip("*."))
)
lists = st.lists(names, max_size=3).map(tuple)


@st.composite
def recipes(draw: st.DrawFn) -> tuple[Recipe, str]:
    """A recipe, and the hash of its text."""
    calibrate = draw(st.sampled_from(["", "self", "a.txt"]))
    quantize = QuantizeRecipe(
        skip_modules=draw(lists),
        calibrate=calibrate,
        calibration_tokens=draw(st.sampled_from([256, 16_384])),
        extra_bytes=draw(st.sampled_from(["", "5%", "2.5 %"])) if calibrate else "",
        allow_unused=draw(lists),
        strip_prefix=draw(st.sampled_from(["", "_orig_mod.", "a.b."])),
    )
    size = draw(st.sampled_from(["1GB", "500MB", "1000MB"]))
    return Recipe(quantize, SerializeRecipe(size)), draw(st.sampled_from(["ab" * 32, "cd" * 32]))


def shaping(recipe: Recipe, text: str) -> tuple[Any, ...]:
    """What the keys of quantize and serialize read of it."""
    tables = recipe.as_json()
    of_text = text if recipe.quantize.calibrate not in ("", "self") else ""
    return tables["quantize"], tables["serialize"], of_text


@given(recipes(), recipes())
def test_two_recipes_share_a_variant_only_if_they_make_the_same_bytes(
    one: tuple[Recipe, str], two: tuple[Recipe, str]
) -> None:
    variants = Variant.of(*one), Variant.of(*two)
    same = shaping(*one) == shaping(*two)
    assert (variants[0] == variants[1]) is same
    assert bool(variants[0].differences(variants[1])) is not same
    if same:
        assert variants[0].tag == variants[1].tag


@given(recipes())
def test_a_tag_is_a_short_safe_name(made: tuple[Recipe, str]) -> None:
    variant = Variant.of(*made)
    tag = variant.tag
    assert (tag == "") is (variant == Variant.of(Recipe()))
    assert re.fullmatch(r"([a-z]+-)+[0-9a-f]{4}|", tag)
    assert len(tag) < 70
    assert split_name(folder_name(BASE, tag)) == (BASE, tag)
    assert tag.startswith(without_hash(tag))


@given(recipes(), st.integers(1, 99), st.floats(0.01, 0.5))
def test_what_only_verify_reads_has_no_part_in_it(
    made: tuple[Recipe, str], tokens: int, limit: float
) -> None:
    recipe, text = made
    verify = VerifyRecipe("p.jsonl", tokens, "text.txt", tokens + 1, max_mean_kl=limit)
    assert Variant.of(replace(recipe, verify=verify), text) == Variant.of(recipe, text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calibrate": "self"}, "calibrated"),
        ({"calibrate": "notes.txt"}, "calibrated-text"),
        ({"calibrate": "self", "calibration_tokens": 300}, "calibrated-tokens"),
        ({"calibrate": "self", "extra_bytes": "5%"}, "calibrated-extra"),
        ({"calibrate": "self", "effort": "high"}, "calibrated-high"),
        ({"calibrate": "self", "effort": "high", "extra_bytes": "5%"}, "calibrated-high-extra"),
        ({"skip_modules": ("h.1",)}, "skip"),
        ({"allow_unused": ("score",)}, "unused"),
        ({"strip_prefix": "_orig_mod."}, "strip"),
        ({"calibration_tokens": 300}, ""),  # nothing without calibration
        ({}, ""),
    ],
)
def test_the_words_say_what_differs(options: dict[str, Any], words: str) -> None:
    tag = Variant.of(Recipe(QuantizeRecipe(**options)), "ab" * 32).tag
    assert without_hash(tag) == words
    assert without_hash(Variant.of(Recipe(serialize=SerializeRecipe("5MB"))).tag) == "shards"


def test_tags_stay_what_they_are() -> None:
    """Folders of earlier versions are found by them."""
    assert Variant.of(Recipe(QuantizeRecipe(calibrate="self"))).tag == "calibrated-301c"
    assert Variant.of(Recipe(QuantizeRecipe(skip_modules=("h.1",)))).tag == "skip-364e"


def test_a_key_that_this_version_does_not_know() -> None:
    tables: dict[str, RecipeTable] = {"quantize": {"block_size": 128}, "serialize": {}}
    tag = Variant(tables).tag
    assert re.fullmatch(r"block-size-[0-9a-f]{4}", tag)


def test_a_name_that_would_be_too_long_has_the_hash_alone() -> None:
    base = "o" * 200 + "@0123456789ab"
    tag = Variant.of(Recipe(QuantizeRecipe(("a",), calibrate="self", extra_bytes="5%"))).tag
    name = folder_name(base, tag)
    assert len(name) < 240
    assert name == f"{base}-{tag[-4:]}"
    assert split_name(name) == (base, tag[-4:])


VARIANTS = {
    "default": Variant.of(Recipe()),
    "calibrated": Variant.of(Recipe(QuantizeRecipe(calibrate="self"))),
    "skip": Variant.of(Recipe(QuantizeRecipe(("h.1",)))),
    "shards": Variant.of(Recipe(serialize=SerializeRecipe("5MB"))),
}


def test_every_order_of_recipes_gives_each_a_folder() -> None:
    for count in range(1, len(VARIANTS) + 1):
        for chosen in combinations(VARIANTS, count):
            for order in (chosen, chosen[::-1]):
                there: dict[str, Variant | None] = {}
                for name in [*order, *order]:
                    there[choose_folder(BASE, VARIANTS[name], there)] = VARIANTS[name]
                assert sorted(v.tag for v in there.values() if v) == sorted(
                    VARIANTS[name].tag for name in order
                )
                assert {split_name(name)[0] for name in there} == {BASE}


@pytest.mark.parametrize("wanted", VARIANTS)
@pytest.mark.parametrize("stands", VARIANTS)
@pytest.mark.parametrize("at", VARIANTS)
def test_a_folder_that_holds_another_recipe_than_its_name_says(
    wanted: str, stands: str, at: str
) -> None:
    """One of an earlier version, or two recipes whose hashes begin alike."""
    taken = folder_name(BASE, VARIANTS[at].tag)
    name = choose_folder(BASE, VARIANTS[wanted], {taken: VARIANTS[stands]})
    if wanted == stands:
        assert name == taken
    else:
        assert name != taken
        assert name.startswith(BASE)
        again = choose_folder(BASE, VARIANTS[wanted], {taken: VARIANTS[stands], name: None})
        assert again == name


def test_a_folder_without_a_recipe_is_taken_by_the_one_of_its_name_only() -> None:
    there: dict[str, Variant | None] = {BASE: None}
    assert choose_folder(BASE, VARIANTS["default"], there) == BASE
    assert choose_folder(BASE, VARIANTS["skip"], there) == f"{BASE}-{VARIANTS['skip'].tag}"
