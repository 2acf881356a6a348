"""Options mean the same as keywords and on the command line, and each is refused by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import click
import nf4_pipeline
import pytest
from nf4_pipeline.api.artifact import Artifact
from nf4_pipeline.api.options import make_machine, make_recipe, make_request, make_target
from nf4_pipeline.errors import RecipeError, UsageError
from nf4_pipeline.recipe import PartialRecipe, QuantizeRecipe, Recipe, load_recipe, parse_size
from nf4_pipeline.runtime.loader import LoadOptions
from nf4_pipeline.runtime.prompt import PromptOptions

from tests.support.command_line import refusal

OF_THE_TERMINAL: Final = {"as_json", "quiet", "verbose", "help"}
"""Options that say how a command prints."""
OTHERWISE: Final = {"public": "private", "raw": "chat", "replaces": "replace"}
"""Options that a keyword says the other way around."""
OF_THE_BUILD: Final = {"model", "artifact", "text", "build_dir"}
"""What an `Artifact` is, and `prompt` takes by position."""
MORE_OF_VERIFY: Final = {"calibrate", "extra_bytes", "effort", "workers", "memory_budget"}
"""Options of every stage command; verify has no use for them."""

COMMANDS: Final[list[tuple[str, Callable[..., Any], set[str]]]] = [
    ("build", nf4_pipeline.build, {"dry_run"}),
    ("verify", Artifact.verify, OF_THE_BUILD | MORE_OF_VERIFY),
    ("push", Artifact.push, OF_THE_BUILD),
    ("prompt", nf4_pipeline.prompt, OF_THE_BUILD),
]


def plain(name: str, default: Any) -> Any:
    """A default as both sides would say it."""
    if default in (None, "", False, 0, ()) or "UNSET" in repr(default).upper():
        return None
    return parse_size(str(default), name) if name == "memory_budget" else default


@pytest.mark.parametrize(("name", "function", "beside"), COMMANDS, ids=[c[0] for c in COMMANDS])
def test_every_option_is_a_keyword(
    name: str, function: Callable[..., Any], beside: set[str]
) -> None:
    command: click.Command = import_module(f"nf4_pipeline.cli.{name}").command
    keywords = inspect.signature(function).parameters
    options = {o.name: o for o in command.params if o.name not in OF_THE_TERMINAL | beside}
    assert len(options) > 5 or name == "prompt"
    for option, parameter in options.items():
        assert option is not None
        keyword = keywords[OTHERWISE.get(option, option)]
        if option not in OTHERWISE:
            assert plain(option, parameter.default) == plain(option, keyword.default) or (
                keyword.default is inspect.Parameter.empty
            )


@pytest.mark.parametrize(
    ("function", "declared", "by_position"),
    [
        (nf4_pipeline.prompt, PromptOptions, {"query", "artifact"}),
        (nf4_pipeline.load, LoadOptions, {"path_or_repo"}),
    ],
)
def test_methods_take_what_functions_take(
    function: Callable[..., Any], declared: Any, by_position: set[str]
) -> None:
    parameters = inspect.signature(function).parameters
    assert set(declared.__annotations__) == set(parameters) - by_position
    for name in declared.__annotations__:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


TABLES: Final[Mapping[str, Mapping[str, object]]] = {
    "quantize": {"skip_modules": ["h.1"]},
    "verify": {"max_mean_kl": 0.25},
}
TOML: Final = '[quantize]\nskip_modules = ["h.1"]\n[verify]\nmax_mean_kl = 0.25\n'


def test_a_recipe_is_one_thing_in_every_form(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(TOML)
    expected = PartialRecipe(load_recipe(path), frozenset(TABLES))
    assert make_recipe(path) == make_recipe(str(path)) == make_recipe(TABLES) == expected
    assert make_recipe(expected) == expected
    as_tuple: Mapping[str, Mapping[str, object]] = {
        **TABLES,
        "quantize": {"skip_modules": ("h.1",)},
    }
    assert make_recipe(as_tuple) == expected
    assert make_recipe(expected.recipe).recipe == expected.recipe
    assert make_recipe() == PartialRecipe(Recipe(), frozenset())


def test_what_an_option_says_wins_and_names_its_table(tmp_path: Path) -> None:
    said = make_recipe(
        {"quantize": {"calibrate": "self"}, "verify": {"eval_tokens": 9}},
        extra_bytes="5%",
        max_shard_size="7MB",
        prompts=tmp_path / "p.jsonl",
        eval_tokens=10,
    )
    assert said.recipe.quantize == QuantizeRecipe(calibrate="self", extra_bytes="5%")
    assert said.recipe.serialize.max_shard_size == "7MB"
    assert said.recipe.verify.prompts == str(tmp_path / "p.jsonl")
    assert said.recipe.verify.eval_tokens == 10
    assert said.given == {"quantize", "serialize", "verify"}
    # Calibration that a recipe asks for can be taken back.
    assert make_recipe(said, calibrate="", extra_bytes="").recipe.quantize == QuantizeRecipe()


REFUSED: Final[dict[str, tuple[Callable[[], object], type[Exception], str]]] = {
    "an unknown table": (
        lambda: make_recipe({"quantise": {}}),
        RecipeError,
        "'quantise' as a table",
    ),
    "an unknown key": (
        lambda: make_recipe({"verify": {"kl": 1}}),
        RecipeError,
        "'kl' in [verify] is unknown",
    ),
    "no table": (lambda: make_recipe({"verify": 3}), RecipeError, "verify is 3"),  # type: ignore[dict-item]
    "a wrong type": (
        lambda: make_recipe({"verify": {"eval_tokens": "9"}}),
        RecipeError,
        "verify.eval_tokens is '9'",
    ),
    "no such file": (lambda: make_recipe("no/such.toml"), RecipeError, "no/such.toml"),
    "extra bytes alone": (lambda: make_recipe(extra_bytes="5%"), RecipeError, "extra_bytes"),
    "no size of a shard": (lambda: make_recipe(max_shard_size="big"), RecipeError, "'big'"),
    "tokens out of range": (lambda: make_recipe(eval_tokens=0), RecipeError, "eval_tokens is 0"),
    "no device": (lambda: make_machine(device="tpu"), UsageError, "'tpu'"),
    "workers below none": (lambda: make_machine(workers=-1), UsageError, "-1"),
    "too many workers": (lambda: make_machine(workers=1025), UsageError, "1025"),
    "no budget": (lambda: make_machine(memory_budget="much"), UsageError, "'much'"),
    "a negative budget": (lambda: make_machine(memory_budget=-1), UsageError, "-1"),
    "no device memory": (lambda: make_machine(device_memory="8XB"), UsageError, "8XB"),
    "a repo without its owner": (lambda: make_target("model"), UsageError, "USER/"),
    "a path as a repo": (lambda: make_target("./me/model"), UsageError, "USER/"),
    "a pattern that is no list": (
        lambda: make_request("m", allow_unused="score"),
        UsageError,
        "expected a list",
    ),
    "a pattern of nothing": (lambda: make_request("m", allow_unused=["*"]), UsageError, "'*'"),
    "a prefix without its dot": (lambda: make_request("m", strip_prefix="x"), UsageError, "'x'"),
    "a folder that can be none": (lambda: make_request("m", build_dir="a\0b"), UsageError, "NUL"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_means_nothing_is_refused(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error):
        call()
    assert message in refusal(call)


def test_values_arrive(tmp_path: Path) -> None:
    machine = make_machine(device="cuda:1", memory_budget=2**20, device_memory="8GB")
    assert (machine.memory_budget, machine.device_memory) == (2**20, 8 * 10**9)
    request = make_request(tmp_path, build_dir="~/b", allow_unused=["score"], check=True)
    assert request.model == str(tmp_path)
    assert request.build_dir == Path("~/b").expanduser()
    assert (request.reading.allow_unused, request.check) == (("score",), True)
    target = make_target("me/model", private=True, create_pr=True)
    assert (target.private, target.pull_request, target.force) == (True, True, False)
