"""A TOML file -> the builds that it asks for, each checked before the first begins.

    [defaults]              # what every model takes unless it says otherwise
    device = "cuda"

    [[model]]
    model = "Qwen/Qwen3-8B"
    revision = "main"

    [[model]]
    model = "Qwen/Qwen3-8B"
    calibrate = "self"

The keys are the options of `nf4 build`, with underscores, as in `nf4_pipeline.build`. Files that it
names are sought beside it, and a local model where the command is run, as by `nf4 build`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Final

from nf4_pipeline.api.options import make_machine, make_recipe, make_request
from nf4_pipeline.errors import RecipeError, UsageError
from nf4_pipeline.machine import Machine
from nf4_pipeline.near_names import near_names
from nf4_pipeline.recipe import Recipe, read_tables
from nf4_pipeline.stages.download_request import DownloadRequest

_MOST: Final = 10_000
_MAKERS: Final = (make_request, make_recipe, make_machine)
_RENAMED: Final = {"replace": "replaces"}
KEYS: Final = frozenset(
    {name for maker in _MAKERS for name in signature(maker).parameters} - {"replaces"} | {"replace"}
)
"""What can be said of a model."""

_PATHS: Final = ("build_dir", "recipe", "prompts", "eval_text")
"""What is meant relative to the file that says it."""


@dataclass(frozen=True)
class Job:
    """One build of a batch.

    Attributes:
        name: of the model, as the file names it.
        options: what the file says beside it, for people.
        request: the model.
        recipe: everything that shapes the bytes.
        machine: what the work may use.
    """

    name: str
    options: str
    request: DownloadRequest
    recipe: Recipe
    machine: Machine


def read_queue(path: Path) -> tuple[Job, ...]:
    """The builds that a file asks for, in its order.

    Raises:
        RecipeError: the file cannot be read or is not TOML, holds something else than [defaults]
            and [[model]], or an unknown key; or a recipe that it names cannot be read.
        UsageError: a value is one that `nf4 build` would refuse.
    """
    tables = read_tables(path)
    unknown = sorted(set(tables) - {"defaults", "model"})
    if unknown:
        raise RecipeError(
            f"{path}: {unknown[0]!r} is neither [defaults] nor [[model]]. Write one [[model]] for "
            'each build, with a line such as model = "Qwen/Qwen3-8B" in it.'
        )
    defaults, models = tables.get("defaults", {}), tables.get("model", [])
    if not isinstance(defaults, dict):
        raise RecipeError(f"{path}: [defaults] is no table.")
    if not isinstance(models, list) or not 0 < len(models) <= _MOST:
        raise RecipeError(
            f"{path}: expected 1 to {_MOST:,} tables [[model]], in double brackets, with a line "
            'such as model = "Qwen/Qwen3-8B" in each.'
        )
    return tuple(
        _job(path, f"[[model]] {number}", table, defaults) for number, table in enumerate(models, 1)
    )


def _job(path: Path, where: str, table: object, defaults: Mapping[str, Any]) -> Job:
    if not isinstance(table, dict):
        raise RecipeError(f"{path}: {where} is no table.")
    said = {**defaults, **table}
    name = said.get("model")
    if not isinstance(name, str) or not name:
        raise RecipeError(f'{path}: {where} has no line such as model = "Qwen/Qwen3-8B".')
    where = f"{path}: {where} ({name[:80]})"
    for key in said:
        if key not in KEYS:
            near = near_names(key, KEYS)
            advice = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(sorted(KEYS))}."
            raise RecipeError(f"{where}: there is no {key[:80]!r}. {advice}")
    for key in _PATHS:
        if isinstance(said.get(key), str) and said[key]:
            said[key] = str(path.parent / said[key])
    if isinstance(said.get("calibrate"), str) and said["calibrate"] not in ("", "self"):
        said["calibrate"] = str(path.parent / said["calibrate"])
    try:
        request, recipe, machine = (_make(maker, said) for maker in _MAKERS)
    except (UsageError, TypeError, AttributeError, ValueError) as error:
        raise (
            type(error)(f"{where}: {error}")
            if isinstance(error, UsageError)
            else RecipeError(f"{where}: a value is of the wrong type ({error}).")
        ) from error
    options = ", ".join(f"{key} = {value!r}" for key, value in table.items() if key != "model")
    return Job(name, options, request, recipe.recipe, machine)


def _make(maker: Any, said: Mapping[str, Any]) -> Any:
    taken = signature(maker).parameters
    named = {_RENAMED.get(key, key): value for key, value in said.items()}
    return maker(**{key: value for key, value in named.items() if key in taken})
