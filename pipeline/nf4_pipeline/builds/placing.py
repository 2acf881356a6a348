"""A source and a recipe -> a folder of their own, which may begin with what is done beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from nf4_pipeline.build_folder import Build
from nf4_pipeline.build_folder.spec import BuildSpec, write_spec
from nf4_pipeline.build_folder.variant import (
    SHAPING_TABLES,
    Variant,
    choose_folder,
    split_name,
    text_sha256,
)
from nf4_pipeline.builds.keeping import spec_of
from nf4_pipeline.builds.listing import Listed
from nf4_pipeline.checkpoint.atomic import link_or_copy, make_folder, sync_folder, write_bytes
from nf4_pipeline.recipe import Recipe

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
        write_spec(root, BuildSpec(source=spec.source, recipe=tables, text_sha256=text))
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
