"""The build or the artifact that a command is about: a model, a tag, a folder's name, or a path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nf4_pipeline.cli.options import ARTIFACTS, Ui
from nf4_pipeline.cli.terminal import say

if TYPE_CHECKING:
    from nf4_pipeline.build_folder import Build
    from nf4_pipeline.builds import ChosenArtifact
    from nf4_pipeline.recipe import PartialRecipe


def named_build(
    ui: Ui, model: str | None, build_dir: Path | None, *, newest: bool = False, needs: str = ""
) -> Build:
    """The build that is meant; says which one it is, unless a path said it.

    Args:
        ui: where that is said.
        model: a model, a tag, a folder's name, or a path; None for the build worked on last.
        build_dir: the folder itself, which wins.
        newest: of several that are meant, take the one worked on last.
        needs: as in `builds.find_build`.

    Raises:
        BuildError: there is no such build.
        UsageError: the name can mean several builds.
    """
    from nf4_pipeline.build_folder import Build
    from nf4_pipeline.builds import find_build

    if build_dir is not None:
        return _build_in(build_dir)
    chosen = find_build(model, ARTIFACTS, newest=newest, needs=needs)
    _note(ui, chosen.note)
    return Build(chosen.listed.root)


def build_for(
    ui: Ui,
    stage: Literal["quantize", "serialize"],
    model: str | None,
    build_dir: Path | None,
    recipe: PartialRecipe,
) -> Build:
    """The build in which a stage shall run by a recipe; says which one it is.

    Args:
        ui: where that is said.
        stage: that shall run.
        model: as in `named_build`.
        build_dir: as in `named_build`.
        recipe: what was said of it.

    Raises:
        BuildError: there is no such build.
        UsageError: the name can mean several builds.
    """
    from nf4_pipeline.builds import find_place

    if build_dir is not None:
        return _build_in(build_dir)
    build, note = find_place(model, stage, recipe, ARTIFACTS)
    _note(ui, note)
    return build


def named_artifact(ui: Ui, name: str, *, newest: bool = False) -> ChosenArtifact | None:
    """The artifact that is meant; None if the name is that of a model without a build.

    Args:
        ui: where it is said which one it is, unless a path said it.
        name: a model, a tag, a folder's name, or a path.
        newest: of several that are meant, take the one worked on last.

    Raises:
        ArtifactError: the build that is meant has no export.
        UsageError: the name can mean several builds.
    """
    from nf4_pipeline.builds import find_artifact

    chosen = find_artifact(name, ARTIFACTS, newest=newest)
    if chosen is not None:
        _note(ui, chosen.note)
    return chosen


def artifact_folder(ui: Ui, name: str, *, newest: bool = False) -> Path:
    """The folder of the artifact that is meant, which must be there.

    Args:
        ui: as in `named_artifact`.
        name: as in `named_artifact`.
        newest: as in `named_artifact`.

    Raises:
        BuildError: there is no such artifact.
        ArtifactError: the build that is meant has no export.
        UsageError: the name can mean several builds.
    """
    from nf4_pipeline.builds import no_build

    chosen = named_artifact(ui, name, newest=newest)
    if chosen is None:
        raise no_build(name, ARTIFACTS)
    return chosen.folder


def other_artifact(ui: Ui, name: str, own: Build) -> str:
    """The artifact that a build is compared with; rather one of the same source than any.

    Args:
        ui: as in `named_artifact`.
        name: as in `named_artifact`.
        own: the build.
    """
    from nf4_pipeline.builds import find_other

    chosen = find_other(name, own, ARTIFACTS)
    if chosen is None:
        return name
    if chosen.note:
        _note(ui, f"against: {chosen.folder}")
    return str(chosen.folder)


def _build_in(folder: Path) -> Build:
    from nf4_pipeline.build_folder import Build
    from nf4_pipeline.errors import BuildError

    if not (folder / "records").is_dir():
        raise BuildError(f"{folder} is no build: it has no records. Start one: nf4 build.")
    return Build(folder)


def _note(ui: Ui, text: str) -> None:
    if text and not ui.quiet:
        say(text, err=True)
