"""The build or the artifact that a command is about: a model, a tag, a folder's name, or a path."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import click

from nf4_pipeline.cli.help import quoted_text
from nf4_pipeline.cli.options import ARTIFACTS, Ui
from nf4_pipeline.cli.terminal import say

if TYPE_CHECKING:
    from nf4_pipeline.build_folder import Build
    from nf4_pipeline.builds import ChosenArtifact, Use
    from nf4_pipeline.recipe import PartialRecipe

_WORD: Final = re.compile(r"[\w.@-]+")
"""What is no path, no address and no Hub id."""

_LIST: Final = " `nf4 status` lists the builds."


def named_build(
    ui: Ui,
    model: str | None,
    build_dir: Path | str | None,
    *,
    newest: bool = False,
    needs: str = "",
    after: str = "",
) -> Build:
    """The build that is meant; says which one it is, unless a path said it.

    Args:
        ui: where that is said.
        model: a model, a tag, a folder's name, or a path; None for the build worked on last.
        build_dir: the folder itself, which wins.
        newest: of several that are meant, take the one worked on last.
        needs: as in `builds.find_build`.
        after: the stage that must be done; none if empty.

    Raises:
        BuildError: there is no such build, or it lacks that stage.
        UsageError: the name can mean several builds.
    """
    from nf4_pipeline.build_folder import Build
    from nf4_pipeline.builds import find_build

    if build_dir is not None:
        return _with_stage(_build_in(build_dir), after)
    chosen = find_build(model, ARTIFACTS, newest=newest, needs=needs, use=_use())
    _note(ui, chosen.note)
    return _with_stage(Build(chosen.listed.root), after)


def build_for(
    ui: Ui,
    stage: Literal["quantize", "serialize"],
    model: str | None,
    build_dir: Path | str | None,
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

    after = {"quantize": "download", "serialize": "quantize"}[stage]
    if build_dir is not None:
        return _with_stage(_build_in(build_dir), after)
    build, note = find_place(model, stage, recipe, ARTIFACTS, _use())
    _note(ui, note)
    return _with_stage(build, after)


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
        raise no_build(name, ARTIFACTS, use=_use())
    error = None if chosen.build else why_no_artifact(chosen.folder, ARTIFACTS, _use())
    if error is not None:
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
        raise UsageError(
            f"The model comes first: nf4 prompt {shlex.quote(text)} {quoted_text(name)}"
        )
    if _WORD.fullmatch(name) and at_revision(name) is None and not Path(name).is_file():
        raise no_build(name, ARTIFACTS, use=_use())
    return name


def _is_model(text: str) -> bool:
    from nf4_pipeline.builds import find_artifact
    from nf4_pipeline.checkpoint.model_name import SAMPLE
    from nf4_pipeline.errors import PipelineError

    with suppress(PipelineError):  # what can be no name is a text
        return text == SAMPLE or find_artifact(text, ARTIFACTS, newest=True) is not None
    return False


def other_artifact(ui: Ui, name: str, own: Build) -> str:
    """The artifact that a build is compared with; rather one of the same source than any.

    Args:
        ui: as in `named_artifact`.
        name: as in `named_artifact`.
        own: the build.
    """
    from nf4_pipeline.builds import find_other, no_build, why_no_artifact
    from nf4_pipeline.checkpoint.model_name import is_hub_id

    chosen = find_other(name, own, ARTIFACTS)
    if chosen is None:
        if is_hub_id(name):
            return name
        raise no_build(name, ARTIFACTS, use=_use("--against"))
    error = None
    if chosen.build is None:
        error = why_no_artifact(chosen.folder, ARTIFACTS, _use("--against"))
    if error is not None:
        raise error
    if chosen.note:
        _note(ui, f"against: {chosen.folder}")
    return str(chosen.folder)


def _build_in(folder: Path | str) -> Build:
    from nf4_pipeline.build_folder import Build
    from nf4_pipeline.builds import at_url
    from nf4_pipeline.checkpoint.model_name import beside
    from nf4_pipeline.errors import BuildError
    from nf4_pipeline.near_names import did_you_mean

    if isinstance(folder, str):
        return at_url(folder)
    if not folder.is_dir():
        near = did_you_mean(folder.name, beside(folder), f"{folder.parent}/")
        raise BuildError(f"--build-dir {folder}: no such folder.{near or _LIST}")
    if not (folder / "records").is_dir():
        raise BuildError(
            f"--build-dir {folder} is no build: it has no records.{_LIST} To start one there: nf4 "
            f"build MODEL --build-dir {shlex.quote(str(folder))}"
        )
    return Build(folder)


def _with_stage(build: Build, after: str) -> Build:
    """The same, if it has a record of a stage.

    Raises:
        BuildError: the build has no record of that stage.
    """
    from nf4_pipeline.builds import not_finished
    from nf4_pipeline.errors import BuildError
    from nf4_pipeline.records import KINDS

    if after and build.record(KINDS[after]) is None:
        raise BuildError(not_finished(build.root, after, _use().command))
    return build


def _use(option: str = "") -> Use:
    """What is wanted of a build, as far as the command that runs tells."""
    from nf4_pipeline.builds import Use

    context = click.get_current_context(silent=True)
    if context is None:
        return Use(option=option)
    return Use(context.info_name or "", context.params.get("repo_id") or "", option)


def _note(ui: Ui, text: str) -> None:
    if text and not ui.quiet:
        say(text, err=True)
