"""Which checkpoint is wanted, how it is read, and where its build folder shall be."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from nf4_pipeline.build_folder import Build
from nf4_pipeline.build_folder.spec import SourcePin
from nf4_pipeline.build_folder.variant import SHAPING_TABLES
from nf4_pipeline.builds import (
    check_spec,
    folder_for,
    how_to_build,
    how_to_finish,
    keep_spec,
    look_at,
    spec_of,
)
from nf4_pipeline.checkpoint.atomic import check_can_be_made
from nf4_pipeline.checkpoint.model_name import SAMPLE, check_hub_id, model_path
from nf4_pipeline.errors import AlreadyQuantizedError, SourceError, UsageError
from nf4_pipeline.progress import SILENT, Reporter
from nf4_pipeline.recipe import Recipe
from nf4_pipeline.records import Reading
from nf4_pipeline.runtime.artifact import ARTIFACTS, is_model
from nf4_pipeline.stages.streamed_source import check_streamable


@dataclass(frozen=True)
class DownloadRequest:
    """Which checkpoint is wanted, and where its build folder shall be.

    Attributes:
        model: Hub id, local folder, or "sample".
        from_hub: the model is a Hub id, whatever folder here is called so.
        artifacts: the folder that holds builds.
        revision: of a Hub model; a branch, a tag or a commit.
        build_dir: the build folder, if not the default one under `artifacts`.
        url: of which it is the local copy; None for the one that is noted in it, or none.
        offline: take a Hub model as it is cached; HF_HUB_OFFLINE says so, too.
        allow_pickle: convert weights that are pickles, where there are no others.
        allow_unhashed: take files for which the Hub lists no hash, too.
        check: hash everything again, also what looks untouched since it was hashed.
        reading: how the tensors are understood.
        recipe: of the build that is made of it; None if that is decided later.
        replaces: a build folder that is another build may become this one.
        stream: the weights stay on the Hub, but where all of them are cached.
    """

    model: str
    artifacts: Path = ARTIFACTS
    revision: str | None = None
    build_dir: Path | None = None
    url: str | None = None
    offline: bool = False
    allow_pickle: bool = False
    allow_unhashed: bool = False
    reading: Reading = field(default_factory=Reading)
    check: bool = False
    recipe: Recipe | None = None
    replaces: bool = False
    from_hub: bool = False
    stream: bool = False

    def check_names(self) -> None:
        """Refuses names that mean nothing, before anything is looked up.

        Raises:
            UsageError: the model is no folder and no Hub id either, a revision was named for a
                local folder, or what is to be streamed cannot be.
            SourceError: the model is a build, or the export of one.
            AccessError: the build folder cannot be made.
        """
        if self.model != SAMPLE and not self.is_folder:
            check_hub_id(self.model)
        elif self.revision is not None:
            raise UsageError(
                f"--revision {self.revision} means nothing for {self.model}, a local folder. "
                "Leave it out."
            )
        if self.is_folder:
            _check_is_source(model_path(self.model))
        if self.stream:
            self._check_streams()
        if self.build_dir is not None:
            check_can_be_made(self.build_dir)

    def _check_streams(self) -> None:
        """Refuses to stream what is here, and what has to be read whole first.

        Raises:
            UsageError: the model is not one of the Hub, or the Hub shall not be asked, or a copy of
                its weights has to be made before they can be quantized.
        """
        if self.model == SAMPLE or self.is_folder:
            raise UsageError(
                f"--stream-source: {self.model} is here already, and only a model of the Hub is "
                "streamed. Leave --stream-source out."
            )
        if self.offline:
            raise UsageError(
                "--stream-source fetches the weights while they are quantized, and --offline asks "
                "nobody. Leave one of the two out."
            )
        for given, option, made in (
            (self.allow_pickle, "--allow-pickle", "converts pickles"),
            (bool(self.reading.strip_prefix), "--strip-prefix", "renames tensors"),
        ):
            if given:
                raise UsageError(
                    f"--stream-source: {option} {made} in a copy of the whole checkpoint, which "
                    "takes the room that streaming saves. Leave one of the two out."
                )
        if self.recipe is not None:
            check_streamable(self.recipe)

    @property
    def is_folder(self) -> bool:
        """Whether the model is a folder of this machine."""
        return not self.from_hub and model_path(self.model).is_dir()

    @property
    def _whole_recipe(self) -> Recipe:
        return self.reading.into(self.recipe or Recipe())

    def build(self, slug: str) -> Build:
        """The build folder.

        Args:
            slug: the default name of it, but for the tag of its recipe.

        Raises:
            RecipeError: the text to calibrate on cannot be read.
        """
        folder = self.build_dir or folder_for(self.artifacts, slug, self._whole_recipe)
        return Build(folder, self.url)

    def keep(self, build: Build, source: SourcePin) -> None:
        """Notes in the build folder, which must be locked, what it is for.

        Raises:
            BuildError: the build folder is for another source or recipe.
        """
        tables = () if self.recipe is None else SHAPING_TABLES
        keep_spec(build, self._whole_recipe, tables, source=source, replaces=self.replaces)

    def check_kept(self, source: SourcePin | None, reporter: Reporter = SILENT) -> None:
        """Refuses a build folder that is for something else, before anything is fetched.

        Args:
            source: which checkpoint it is; None if that is not known without its files.
            reporter: told of what stands at the URL.

        Raises:
            BuildError: the build folder is for another source or recipe.
            StoreError: the store at the URL refuses or does not answer, or holds something else.
        """
        if self.build_dir is None:
            return
        build = Build(self.build_dir, self.url)
        build.pull(reporter, begins=True)
        if self.replaces:
            return
        recipe = self._whole_recipe
        tables = () if self.recipe is None else SHAPING_TABLES
        spec = spec_of(build, recipe)
        check_spec(build, spec, recipe, tables, source=source)


def _check_is_source(folder: Path) -> None:
    """Refuses what was built where the source of a build is wanted.

    Raises:
        SourceError: the folder is a build, or the export of one.
    """
    is_export = folder.absolute().name == "export"
    root = folder.absolute().parent if is_export else folder
    if not (root / "records").is_dir() or is_model(folder) != is_export:
        return
    build = look_at(root)
    if is_export:
        raise AlreadyQuantizedError(
            f"{folder} is already quantized: it is the 4-bit artifact of a build. Use it: nf4 "
            f'prompt {shlex.quote(str(folder))} "Hello". To build another from its source: '
            f"{how_to_build(build)}"
        )
    where = shlex.quote(str(folder))
    raise SourceError(
        f"{folder} is a build folder of nf4, not a model. To see how far it is: nf4 status "
        f"--build-dir {where} . To go on with it: {how_to_finish(build)}"
    )
