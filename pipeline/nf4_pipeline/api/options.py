"""Options -> what the stages take. Each has one name: a keyword here, `--an-option` of `nf4`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nf4_pipeline.checkpoint.named_path import is_url, local_copy, named_path
from nf4_pipeline.errors import UsageError
from nf4_pipeline.machine import DEFAULT_MEMORY_BUDGET, ENGINES, Machine, check_device_name
from nf4_pipeline.recipe import TABLES, PartialRecipe, Recipe, parse_recipe, parse_size, read_tables

if TYPE_CHECKING:
    from nf4_pipeline.hub import Target
    from nf4_pipeline.stages.download_request import DownloadRequest

PathName = str | PathLike[str]
RecipeLike = PathName | Recipe | Mapping[str, Mapping[str, object]]
"""A recipe, the TOML file of one, or the tables that would stand in it."""

_REPO_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w-][\w.-]*", re.ASCII)
_MOST_WORKERS: Final = 1024


def make_request(
    model: PathName,
    *,
    revision: str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    allow_unhashed: bool = False,
    check: bool = False,
    allow_unused: Sequence[str] = (),
    strip_prefix: str = "",
    build_dir: PathName | None = None,
    replaces: bool = False,
    stream_source: bool = False,
) -> DownloadRequest:
    """Which checkpoint is wanted, and how it is read; `DownloadRequest` says what each means.

    Raises:
        UsageError: a pattern or a prefix can be no name of tensors, a path can be none, or no build
            can be kept at a URL.
    """
    from nf4_pipeline.object_store.address import check_path, check_url
    from nf4_pipeline.records import Reading
    from nf4_pipeline.stages.download_request import DownloadRequest

    if isinstance(allow_unused, str):
        raise UsageError(f"allow_unused is {allow_unused[:80]!r}; expected a list of patterns.")
    reading = Reading(tuple(allow_unused), strip_prefix)
    reading.into(Recipe())  # refuses what can be no name
    folder = None if build_dir is None else fspath(build_dir)
    url = check_url(folder) if folder is not None and is_url(folder) else None
    if folder is not None:
        check_path(folder)
        build_dir = local_copy(url) if url is not None else named_path(folder)
    return DownloadRequest(
        fspath(model),
        revision=revision,
        build_dir=build_dir if build_dir is None else Path(build_dir),
        url=url,
        offline=offline,
        allow_pickle=allow_pickle,
        allow_unhashed=allow_unhashed,
        reading=reading,
        check=check,
        replaces=replaces,
        stream=stream_source,
    )


def make_recipe(
    recipe: RecipeLike | PartialRecipe | None = None,
    *,
    calibrate: PathName | None = None,
    extra_bytes: str | None = None,
    effort: str | None = None,
    max_shard_size: str | None = None,
    prompts: PathName | None = None,
    eval_text: PathName | None = None,
    eval_tokens: int | None = None,
) -> PartialRecipe:
    """A recipe with what the options say instead of what it says.

    Raises:
        RecipeError: the recipe or an option holds an unknown key, a wrong type or a value out of
            range, or the recipe's file cannot be read.
    """
    quantize: dict[str, Any] = {
        "calibrate": _text(calibrate),
        "extra_bytes": extra_bytes,
        "effort": effort,
    }
    said: dict[str, dict[str, Any]] = {
        "quantize": quantize,
        "serialize": {"max_shard_size": max_shard_size},
        "verify": {
            "prompts": _text(prompts),
            "eval_text": _text(eval_text),
            "eval_tokens": eval_tokens,
        },
    }
    whole, given = _read(recipe)
    for name, options in said.items():
        if values := {key: value for key, value in options.items() if value is not None}:
            if name == "quantize":
                values["rounding"] = ""  # it follows from the others
            whole = replace(whole, **{name: replace(getattr(whole, name), **values)})
            given |= {name}
    return PartialRecipe(whole, given)


def _read(recipe: RecipeLike | PartialRecipe | None) -> tuple[Recipe, frozenset[str]]:
    """A recipe, and the names of the tables that were said."""
    if recipe is None:
        return Recipe(), frozenset()
    if isinstance(recipe, PartialRecipe):
        return recipe.recipe, recipe.given
    if isinstance(recipe, Recipe):
        return recipe, frozenset(TABLES)
    if isinstance(recipe, Mapping):
        tables: Mapping[str, object] = {
            name: {key: _listed(value) for key, value in table.items()}
            if isinstance(table, Mapping)
            else table
            for name, table in recipe.items()
        }
        return parse_recipe(tables, "The recipe"), frozenset(tables)
    path = Path(fspath(recipe))
    tables = read_tables(path)
    return parse_recipe(tables, str(path)), frozenset(tables)


def _listed(value: object) -> object:
    """A value as TOML would give it."""
    if isinstance(value, PathLike):
        return fspath(value)
    return list(value) if isinstance(value, tuple) else value


def _text(path: PathName | None) -> str | None:
    return None if path is None else fspath(path)


def make_machine(
    *,
    device: str = "auto",
    require_gpu: bool = False,
    workers: int = 0,
    memory_budget: str | int = DEFAULT_MEMORY_BUDGET,
    device_memory: str | int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
) -> Machine:
    """What the work may use; `Machine` says what each means.

    Raises:
        UsageError: a value is out of its range, or no size, device or engine, or the options do
            not go together.
    """
    check_device_name(device)
    known = next((name for name in ENGINES if name == engine), None)
    if known is None:
        raise UsageError(f"--engine {engine[:80]!r}: expected {' or '.join(ENGINES)}.")
    if ray_address is not None and engine != "ray":
        raise UsageError("--ray-address says where a Ray cluster is: add --engine ray.")
    if engine == "ray" and device.startswith("cuda:"):
        raise UsageError(
            f"--device {device}: a GPU has no number on a cluster. With --engine ray, write "
            "--device cuda for its GPUs, or cpu."
        )
    if not 0 <= workers <= _MOST_WORKERS:
        raise UsageError(f"--workers {workers}: expected 0 to {_MOST_WORKERS}.")
    return Machine(
        device=device,
        require_gpu=require_gpu,
        workers=workers,
        memory_budget=parse_size(str(memory_budget), "--memory-budget"),
        device_memory=parse_size(str(device_memory), "--device-memory") if device_memory else 0,
        engine=known,
        ray_address=ray_address,
    )


def make_target(
    repo_id: str, *, private: bool | None = None, create_pr: bool = False, force: bool = False
) -> Target:
    """Where a push goes; `Target` says what each option means.

    Raises:
        UsageError: the repo is not called ORG/NAME.
    """
    from nf4_pipeline.hub import Target

    check_repo_id(repo_id)
    return Target(repo_id, private, create_pr, force)


def _expected_of(repo_id: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", repo_id.strip("/")).strip("-.")
    if name and "/" not in repo_id:
        return (
            f"the owner is missing. Write your user name on the Hub, or that of an organization, "
            f"before it: --repo-id USER/{name}"
        )
    return (
        "expected USER/NAME, of letters, digits, -, _ and dots, with your user name on the Hub or "
        "an organization first."
    )


def check_repo_id(repo_id: str | None) -> None:
    """Refuses what no repo of the Hub can be called; None stands for no repo.

    Raises:
        UsageError: the repo is not called ORG/NAME.
    """
    if repo_id is not None and not _REPO_ID.fullmatch(repo_id):
        raise UsageError(f"--repo-id {repo_id[:120]!r}: {_expected_of(repo_id)}")
