"""The build or the artifact that a command is about: a model, a tag, a folder's name, or a path."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from nf4_pipeline.cli.options import ARTIFACTS, Ui
from nf4_pipeline.cli.terminal import say

if TYPE_CHECKING:
    from nf4_pipeline.build_folder import Build
    from nf4_pipeline.builds import ChosenArtifact
    from nf4_pipeline.recipe import PartialRecipe

_WORD: Final = re.compile(r"[\w.@-]+")
"""What is no path, no address and no Hub id."""


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
    from nf4_pipeline.builds import no_build, why_no_artifact

    chosen = named_artifact(ui, name, newest=newest)
    if chosen is None:
        raise no_build(name, ARTIFACTS)
    if chosen.build is None and (error := why_no_artifact(chosen.folder, ARTIFACTS)) is not None:
        raise error
    return chosen.folder


def without_build(name: str, text: str) -> str:
    """The name of a model of which there is no build, if it can be one.

    Args:
        name: as it was given.
        text: the prompt for it; people put the two the other way round.

    Raises:
        BuildError: the name is one word, and no model is called so.
        UsageError: the prompt is the name of a model, and the name is none.
    """
    from nf4_pipeline.builds import no_build
    from nf4_pipeline.checkpoint.model_name import SAMPLE, at_revision, is_hub_id
    from nf4_pipeline.errors import UsageError

    if name == SAMPLE or (is_hub_id(name) and not any(map(str.isspace, name))):
        return name
    if _is_model(text):
        raise UsageError(f"The model comes first: nf4 prompt {shlex.quote(text)} {_as_text(name)}")
    if _WORD.fullmatch(name) and at_revision(name) is None and not Path(name).is_file():
        raise no_build(name, ARTIFACTS)
    return name


def _is_model(text: str) -> bool:
    from nf4_pipeline.builds import find_artifact
    from nf4_pipeline.checkpoint.model_name import SAMPLE
    from nf4_pipeline.errors import PipelineError

    with suppress(PipelineError):  # what can be no name is a text
        return text == SAMPLE or find_artifact(text, ARTIFACTS, newest=True) is not None
    return False


def _as_text(text: str) -> str:
    return f'"{text}"' if not {*text} & {*'"$`\\!'} else shlex.quote(text)


def other_artifact(ui: Ui, name: str, own: Build) -> str:
    """The artifact that a build is compared with; rather one of the same source than any.

    Args:
        ui: as in `named_artifact`.
        name: as in `named_artifact`.
        own: the build.
    """
    from nf4_pipeline.builds import find_other, no_build
    from nf4_pipeline.checkpoint.model_name import is_hub_id

    chosen = find_other(name, own, ARTIFACTS)
    if chosen is None:
        if is_hub_id(name):
            return name
        raise no_build(name, ARTIFACTS)
    if chosen.note:
        _note(ui, f"against: {chosen.folder}")
    return str(chosen.folder)


def _build_in(folder: Path) -> Build:
    from nf4_pipeline.build_folder import Build
    from nf4_pipeline.errors import BuildError

    if not (folder / "records").is_dir():
        raise BuildError(
            f"{folder} is no build: it has no records. Start one: nf4 build MODEL --build-dir "
            f"{shlex.quote(str(folder))}."
        )
    return Build(folder)


def _note(ui: Ui, text: str) -> None:
    if text and not ui.quiet:
        say(text, err=True)
