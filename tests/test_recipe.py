"""A recipe: read strictly, frozen, and each wrong one told apart."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from nf4_pipeline.errors import RecipeError
from nf4_pipeline.recipe import (
    QuantizeRecipe,
    Recipe,
    SerializeRecipe,
    VerifyRecipe,
    load_recipe,
    parse_recipe,
    parse_size,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, "utf-8")
    return path


def test_every_key_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        [quantize]
        skip_modules = ["h.31.mlp", "lm_head"]
        rounding = "nearest"
        [serialize]
        max_shard_size = "500MB"
        [verify]
        prompts = "my.jsonl"
        max_new_tokens = 5
        eval_tokens = 100
        max_mean_kl = 1
        min_sure_agreement = 0.25
        max_accuracy_drop = 0.0
        """,
    )
    assert load_recipe(path) == Recipe(
        QuantizeRecipe(("h.31.mlp", "lm_head")),
        SerializeRecipe("500MB"),
        VerifyRecipe(
            prompts="my.jsonl",
            max_new_tokens=5,
            eval_tokens=100,
            max_mean_kl=1.0,
            min_sure_agreement=0.25,
            max_accuracy_drop=0.0,
        ),
    )


def test_a_calibrated_recipe(tmp_path: Path) -> None:
    text = '[quantize]\ncalibrate = "self"\ncalibration_tokens = 512\nextra_bytes = "2.5 %"'
    recipe = load_recipe(write(tmp_path, text)).quantize
    assert recipe == QuantizeRecipe(
        calibrate="self", calibration_tokens=512, extra_bytes="2.5 %", rounding="calibrated"
    )
    assert recipe.extra_share == 0.025
    assert QuantizeRecipe().extra_share == 0
    assert parse_recipe(Recipe(recipe).as_json(), "manifest") == Recipe(recipe)
    text_recipe = QuantizeRecipe(calibrate="/home/me/my text.txt")
    assert text_recipe.shaping()["calibrate"] == "text"  # not where it lies


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "")) == Recipe()


def test_a_recipe_survives_json(tmp_path: Path) -> None:
    recipe = Recipe(QuantizeRecipe(("a", "b")), SerializeRecipe("1GiB"), VerifyRecipe("p", 9))
    assert parse_recipe(recipe.as_json(), "manifest") == recipe


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().quantize.rounding = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[quantise]", "'quantise' as a table is unknown. Did you mean 'quantize'"),
        ("x = 1", "'x' as a table is unknown. Expected quantize, serialize, verify"),
        ("quantize = 3", r"quantize is 3; expected a table \[quantize\]"),
        ("[quantize]\nskip = []", r"'skip' in \[quantize\] is unknown"),
        ('[quantize]\nskip_modules = "a"', "quantize.skip_modules is 'a'; expected a list"),
        ("[quantize]\nskip_modules = [1]", r"quantize.skip_modules is \[1\]; expected a list"),
        ('[quantize]\nskip_modules = [""]', "names of modules, none of them empty"),
        ('[quantize]\nrounding = "awq"', "quantize.rounding is 'awq'; expected \"nearest\""),
        ("[quantize]\nrounding = true", "quantize.rounding is True; expected a str"),
        ('[quantize]\nrounding = "calibrated"', "'calibrated'; expected \"nearest\", since"),
        (
            '[quantize]\ncalibrate = "self"\nrounding = "nearest"',
            "'nearest'; expected \"calibrated\", since quantize.calibrate is 'self'",
        ),
        ("[quantize]\ncalibrate = true", "quantize.calibrate is True; expected a str"),
        ("[quantize]\ncalibration_tokens = 255", "is 255; expected at least 256"),
        ('[quantize]\nextra_bytes = "5%"', "needs quantize.calibrate.*calibrate = .self"),
        ('[quantize]\ncalibrate = "self"\nextra_bytes = "0.05"', "'0.05'; expected a percentage"),
        ('[quantize]\ncalibrate = "self"\nextra_bytes = "100.5%"', "expected a percentage"),
        ('[quantize]\ncalibrate = "self"\nextra_bytes = "nan%"', "expected a percentage"),
        ('[quantize]\neffort = "high"', "effort needs quantize.calibrate.*calibrate = .self"),
        ('[quantize]\ncalibrate = "self"\neffort = "low"', "'low'; expected \"high\""),
        ("[quantize]\ncalibrate = 'self'\neffort = true", "effort is True; expected a str"),
        ("[quantize]\nextra_bytes = 5", "quantize.extra_bytes is 5; expected a str"),
        ('[serialize]\nmax_shard_size = "0GB"', "serialize.max_shard_size is '0GB'; expected > 0"),
        ('[serialize]\nmax_shard_size = "5XB"', "'5XB'; expected a size such as"),
        ('[serialize]\nmax_shard_size = "-5GB"', "'-5GB'; expected a size"),
        ("[serialize]\nmax_shard_size = 5", "serialize.max_shard_size is 5; expected a str"),
        ("[verify]\nmax_new_tokens = 0", "verify.max_new_tokens is 0; expected > 0"),
        ("[verify]\nmax_new_tokens = 1.5", "verify.max_new_tokens is 1.5; expected a int"),
        ("[verify]\nmax_new_tokens = true", "verify.max_new_tokens is True; expected a int"),
        ("[verify]\neval_tokens = 1", "verify.eval_tokens is 1; expected > 1"),
        ("[verify]\nmax_mean_kl = 0", "verify.max_mean_kl is 0.0; expected > 0"),
        ("[verify]\nmax_mean_kl = true", "verify.max_mean_kl is True; expected a float"),
        ("[verify]\nmax_mean_kl = nan", "verify.max_mean_kl is nan; expected a finite number"),
        ("[verify]\nmin_sure_agreement = 1.1", "min_sure_agreement is 1.1; expected from 0 to 1"),
        ("[verify]\nmax_accuracy_drop = -0.1", "max_accuracy_drop is -0.1; expected from 0 to 1"),
        ("[verify", "is not valid TOML"),
        ("[verify]\n[verify]", "is not valid TOML"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    "text", ["[verify]\nmax_new_tokens = 0", '[quantize]\nrounding = "awq"', "[serialise]"]
)
def test_every_message_names_the_file(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="cannot be read: it is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'[verify]\nprompts = "\xe9"')
    with pytest.raises(RecipeError, match="is not valid TOML"):
        load_recipe(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("2 GiB", 2**31),
        ("1.5kib", 1536),
        (" 7kb ", 7000),
        ("1000000", 10**6),
        ("0", 0),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "x") == size


@pytest.mark.parametrize("text", ["1", "5", "40.5", "999999"])
def test_a_size_whose_unit_was_forgotten(text: str) -> None:
    with pytest.raises(RecipeError, match=rf'without a unit.*such as "{text}GB" or "{text}MB"'):
        parse_size(text, "the.size")


@pytest.mark.parametrize(
    ("said", "meant"), [("5", "5%"), ("2.5", "2.5%"), ("5%", "5%"), ("0", "0%")]
)
def test_a_percentage_needs_no_sign(said: str, meant: str) -> None:
    assert QuantizeRecipe(calibrate="self", extra_bytes=said).extra_bytes == meant


@pytest.mark.parametrize("text", ["", "GB", "5 5GB", "1e9", "0x10", "5TB", "5GBs", "inf", "٣GB²"])
def test_texts_that_are_no_size(text: str) -> None:
    with pytest.raises(RecipeError, match=r"the\.size is .*expected a size"):
        parse_size(text, "the.size")
