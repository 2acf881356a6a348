"""What a build folder is for, noted before any work; it becomes nothing else unasked."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Final

from nf4_pipeline.build_folder import Build
from nf4_pipeline.build_folder.spec import BuildSpec, SourcePin, read_spec, write_spec
from nf4_pipeline.build_folder.variant import SHAPING_TABLES, Variant, text_sha256
from nf4_pipeline.calibration.calibrator import Calibrator
from nf4_pipeline.checkpoint.digest import content_sha256
from nf4_pipeline.errors import BuildError
from nf4_pipeline.recipe import TABLES, PartialRecipe, Recipe, RecipeValue
from nf4_pipeline.records import DOWNLOAD, KINDS, QUANTIZE, SERIALIZE, source_files

READING: Final = frozenset({"quantize.allow_unused", "quantize.strip_prefix"})
"""The keys of a recipe that download reads."""

_MOST_SHOWN: Final = 4


def spec_of(build: Build, recipe: Recipe | None = None) -> BuildSpec | None:
    """What a build folder is for, as it says itself; else as its records say.

    Args:
        build: the build folder.
        recipe: that is wanted there. An earlier version did not note which text a build was
            calibrated on; whether it was the one of this recipe can be found out.
    """
    if (spec := read_spec(build.root)) is not None:
        return spec
    downloaded = build.record(DOWNLOAD)
    if downloaded is None:
        return None
    facts = downloaded.facts
    files = facts.converted_from or source_files(downloaded)
    source = SourcePin(repo=facts.repo, commit=facts.commit, sha256=content_sha256(files))
    tables: dict[str, dict[str, Any]] = {}
    if (quantized := build.record(QUANTIZE)) is not None:
        tables["quantize"] = dict(quantized.recipe)
    if (serialized := build.record(SERIALIZE)) is not None:
        tables["serialize"] = dict(serialized.recipe)
    text = None
    if recipe is not None and tables.get("quantize", {}).get("calibrate", "") not in ("", "self"):
        sought = text_sha256(recipe)
        calibrator = Calibrator(
            build.source, facts.content_sha256, build.calibration, recipe.quantize, "cpu"
        )
        if sought is not None and calibrator.key_part()["tokens"] is not None:
            text = sought
    return BuildSpec(source=source, recipe=tables, text_sha256=text)


def keep_spec(
    build: Build,
    recipe: Recipe,
    tables: Collection[str],
    *,
    source: SourcePin | None = None,
    replaces: bool = False,
) -> None:
    """Notes what a build folder, which must be locked, is for, before anything is written there.

    Args:
        build: the build folder.
        recipe: that is wanted, all of it.
        tables: of it that are decided by this; none for a download, which reads some keys only.
        source: that is wanted; None for the one that is there.
        replaces: the folder may become one of another source or recipe.

    Raises:
        BuildError: the folder is for another source or another recipe.
        RecipeError: the text to calibrate on cannot be read.
    """
    spec = spec_of(build, recipe)
    if spec is None and source is None:
        return
    if not replaces:
        check_spec(build, spec, recipe, tables, source=source)
    pin = source if source is not None else spec.source if spec else None
    assert pin is not None
    kept = spec.recipe if spec else {}
    text = spec.text_sha256 if spec else None
    new = BuildSpec(
        source=pin,
        recipe={
            name: recipe.table(name) if name in tables else dict(kept[name])
            for name in SHAPING_TABLES
            if name in tables or name in kept
        },
        text_sha256=text_sha256(recipe) if "quantize" in tables else text,
    )
    if new.to_json() != (read_spec(build.root) or replace(new, version=0)).to_json():
        write_spec(build.root, new)


def check_spec(
    build: Build,
    spec: BuildSpec | None,
    recipe: Recipe,
    tables: Collection[str],
    *,
    source: SourcePin | None = None,
) -> None:
    """Refuses to make another build of a build.

    Args:
        build: the build folder.
        spec: what it is for; None if it is for nothing yet.
        recipe: as in `keep_spec`.
        tables: as in `keep_spec`.
        source: as in `keep_spec`.

    Raises:
        BuildError: the folder is for another source or another recipe.
        RecipeError: the text to calibrate on cannot be read.
    """
    if spec is None:
        return
    problems = []
    if source is not None and not source.is_same(spec.source):
        problems.append(f"its source is {spec.source.shown}, and {source.shown} was asked for")
    theirs = spec.variant()
    differences = Variant.of(recipe, text_sha256(recipe)).differences(theirs)
    for key, (asked, there) in differences.items():
        table = key.partition(".")[0]
        if table not in spec.decided or key == "quantize.rounding":
            continue
        if table in tables or (not tables and key in READING):
            problems.append(f"{key} is {_shown(there)}, and {_shown(asked)} was asked for")
    if problems:
        more = f"; and {len(problems) - _MOST_SHOWN} more" if len(problems) > _MOST_SHOWN else ""
        raise BuildError(
            f"{build.root} is another build: {'; '.join(problems[:_MOST_SHOWN])}{more}. It was "
            "left as it is. Leave --build-dir out, or name another one, and both stand side by "
            "side; or add --replace, and this one is made anew."
        )


def _shown(value: RecipeValue) -> str:
    if value in ("", []):
        return "not set"
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def complete_recipe(
    build: Build, recipe: Recipe | PartialRecipe, before: str | None = None
) -> Recipe:
    """A recipe with the tables that a build is for or was made with, where no others were said.

    Args:
        build: whose spec and records hold the tables.
        recipe: what was said.
        before: the stage that comes next (see `PartialRecipe.completed`).
    """
    if not isinstance(recipe, Recipe):
        records = {name: build.record(KINDS[name]) for name in TABLES}
        tables = {name: record.recipe for name, record in records.items() if record}
        spec = spec_of(build)
        recipe = recipe.completed({**tables, **(spec.recipe if spec else {})}, before)
    downloaded = build.record(DOWNLOAD)
    return downloaded.facts.reading.into(recipe) if downloaded else recipe
