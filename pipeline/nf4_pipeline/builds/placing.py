"""A source and a recipe -> a folder of their own, which may begin with what is done beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from nf4_pipeline.build_folder import Build
from nf4_pipeline.build_folder.spec import BuildSpec
from nf4_pipeline.build_folder.variant import (
    SHAPING_TABLES,
    Variant,
    choose_folder,
    split_name,
    text_sha256,
)
from nf4_pipeline.builds.absent import ANY_USE, Use
from nf4_pipeline.builds.choosing import ambiguous
from nf4_pipeline.builds.finding import candidates, find_build
from nf4_pipeline.builds.keeping import complete_recipe, spec_of
from nf4_pipeline.builds.listing import Listed, list_builds
from nf4_pipeline.checkpoint.atomic import link_or_copy, make_folder, sync_folder, write_bytes
from nf4_pipeline.errors import UsageError
from nf4_pipeline.recipe import PartialRecipe, Recipe
from nf4_pipeline.runtime.artifact import ARTIFACTS

_FOLDERS: Final = {"download": ("converted", "source"), "quantize": ("quantized", "calibration")}
"""What a stage leaves that the next one reads."""


def folder_for(artifacts: Path, base: str, recipe: Recipe) -> Path:
    """The folder in which a recipe's build of a source is, or shall be.

    Args:
        artifacts: the folder that holds builds.
        base: `<org>--<name>@<sha12>`, of the source.
        recipe: all of it.

    Raises:
        RecipeError: the text to calibrate on cannot be read.
    """
    there: dict[str, Variant | None] = {}
    for root in artifacts.iterdir() if artifacts.is_dir() else ():
        if root.name == base or root.name.startswith(f"{base}-"):
            spec = spec_of(Build(root), recipe)
            decided = spec is not None and "quantize" in spec.decided
            there[root.name] = spec.variant() if spec is not None and decided else None
    return artifacts / choose_folder(base, Variant.of(recipe, text_sha256(recipe)), there)


def place_of(build: Listed, recipe: Recipe) -> Path:
    """The folder in which a recipe's build of the source of a build is, or shall be.

    A folder that was named by the user is that for any recipe.

    Args:
        build: one of that source.
        recipe: all of it.
    """
    base, tag = split_name(build.root.name)
    if tag is None or build.spec is None or build.spec.source.slug != base:
        return build.root
    return folder_for(build.root.parent, base, recipe)


def find_place(
    name: str | Path | None,
    stage: Literal["quantize", "serialize"],
    said: PartialRecipe,
    artifacts: Path = ARTIFACTS,
    use: Use = ANY_USE,
) -> tuple[Build, str]:
    """The build in which a stage shall run by what was said of its recipe.

    A model, or no name, means the build of that recipe, which begins with what is done beside it. A
    tag or a path means the build that is there. Where nothing was said of the recipe, the build
    that is there goes on; of several, `quantize` means that of the default recipe.

    Args:
        name: as in `find_build`.
        stage: that shall run.
        said: of the recipe.
        artifacts: the folder that holds builds.
        use: as in `find_build`.

    Returns:
        The build, and a note for people, which one it is; empty if a path said it.

    Raises:
        BuildError: there is no such build.
        UsageError: the name can mean several builds, or can be no name.
        RecipeError: the text to calibrate on cannot be read.
    """
    needs = {"quantize": "download", "serialize": "quantize"}[stage]
    newest = find_build(name, artifacts, newest=True, needs=needs, use=use)
    if newest.named:
        chosen = find_build(name, artifacts, needs=needs)
        return Build(chosen.listed.root), chosen.note
    found = candidates(name, list_builds(artifacts))
    fit = [build for build in found if build.has(needs)] or found

    anew = stage == "quantize" and ("quantize" in said.given or (name is not None and len(fit) > 1))
    recipe = said.recipe if anew else said
    recipes = {build.root: complete_recipe(Build(build.root), recipe, stage) for build in fit}
    places = {place_of(build, recipes[build.root]): build for build in reversed(fit)}
    if len(places) > 1 and name is not None:
        raise UsageError(ambiguous(str(name), fit))
    origin = fit[0]
    place = place_of(origin, recipes[origin.root])
    if place == origin.root:
        return Build(place), newest.note
    done = [of for of in ("download", "quantize") if of == "download" or stage == "serialize"]
    build = begin_beside(Build(origin.root), place, recipes[origin.root], done)
    return build, f"build: {place}, beside {origin.root}"


def begin_beside(origin: Build, root: Path, recipe: Recipe, stages: Sequence[str]) -> Build:
    """A build folder that begins with what another one of the same source has done.

    Nothing is copied where the disk allows links, and nothing of the other one changes. Run again
    after a kill, it goes on.

    Args:
        origin: the other one.
        root: the folder.
        recipe: of the new one.
        stages: that it begins with: "download", or "download" and "quantize".
    """
    build = Build(root)
    spec = spec_of(origin)
    names = [f"records/{stage}.json" for stage in stages]
    with build.locked():
        if spec is None or all((root / name).is_file() for name in names):
            return build
        tables = {name: recipe.table(name) for name in SHAPING_TABLES}
        text = text_sha256(recipe)
        build.write_spec(BuildSpec(source=spec.source, recipe=tables, text_sha256=text))
        for stage in stages:
            for folder in _FOLDERS[stage]:
                _link_files(origin.root, root, folder)
        for name in names:
            write_bytes(root / name, (origin.root / name).read_bytes())
    return build


def _link_files(origin: Path, root: Path, folder: str) -> None:
    """Gives the files of a folder a name in another build; those of source/ are links already."""
    old = (origin / "converted").resolve()
    for path in sorted((origin / folder).rglob("*")):
        target = root / path.relative_to(origin)
        if path.is_symlink():
            place = path.resolve()
            if place.is_relative_to(old):
                place = root.resolve() / "converted" / place.relative_to(old)
            make_folder(target.parent)
            target.unlink(missing_ok=True)
            target.symlink_to(place)
            sync_folder(target.parent)
        elif path.is_file() and not path.name.startswith("."):
            make_folder(target.parent)
            link_or_copy(path, target)
