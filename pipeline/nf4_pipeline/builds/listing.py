"""What is known of each build without reading its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nf4_pipeline.build_folder import Build
from nf4_pipeline.build_folder.spec import BuildSpec
from nf4_pipeline.build_folder.variant import DEFAULT_TAG, Variant, split_name, without_hash
from nf4_pipeline.builds.keeping import spec_of
from nf4_pipeline.records import DOWNLOAD, KINDS
from nf4_pipeline.runtime.artifact import ARTIFACTS, build_roots

_SAMPLE = "sample"


@dataclass(frozen=True)
class Listed:
    """A build, as a listing shows it.

    Attributes:
        root: the build folder.
        spec: what it is for; None if neither it nor its records say so.
        is_sample: it is of the model that comes with the package.
        source: where its local source is, or its files are; None if that is not known.
        done: the stages that left a record, in their order.
        is_streamed: its weights stay on the Hub.
    """

    root: Path
    spec: BuildSpec | None
    is_sample: bool = False
    source: Path | None = None
    done: tuple[str, ...] = ()
    is_streamed: bool = False

    @property
    def variant(self) -> Variant | None:
        """What it makes of its source; None if nobody has decided."""
        if self.spec is None or "quantize" not in self.spec.decided:
            return None
        return self.spec.variant()

    @property
    def tag(self) -> str:
        """By which it is called: that of its recipe; of an earlier version, its name has none."""
        own = self.variant.tag if self.variant else split_name(self.root.name)[1]
        return own or DEFAULT_TAG

    @property
    def names(self) -> set[str]:
        """By which it is found, besides that of its model."""
        in_name = split_name(self.root.name)[1]
        return {self.root.name, in_name or "", self.tag, without_hash(self.tag)} - {""}

    def has(self, what: str) -> bool:
        """Whether a stage is done, or it has a "recipe"; anything has ""."""
        return not what or what in self.done or (what == "recipe" and self.variant is not None)

    def is_of(self, model: str) -> bool:
        """Whether it is a build of a model, as `nf4 build` takes it: a Hub id, or "sample"."""
        if self.is_sample:
            return model == _SAMPLE
        return self.spec is not None and self.spec.source.repo == model

    def is_of_folder(self, folder: Path) -> bool:
        """Whether its source is a local folder.

        Args:
            folder: with all links followed.
        """
        return self.source == folder

    @property
    def shown(self) -> str:
        """For people: its tag, what differs in its recipe, and how far it is."""
        if self.variant is None:
            recipe = "no recipe yet"
        else:
            recipe = recipe_shown(self.variant) or "default recipe"
        return f"{self.root.name} ({recipe}; {self.done[-1] if self.done else 'nothing'} done)"


def recipe_shown(variant: Variant) -> str:
    """What of a recipe is not the default, for people; empty for the default."""
    from nf4_pipeline.recipe import Recipe

    own = variant.differences(Variant.of(Recipe()))
    return ", ".join(
        f"{key.partition('.')[2]} = {value}"
        for key, (value, _) in own.items()
        if key != "quantize.rounding"
    )


def list_builds(artifacts: Path = ARTIFACTS) -> list[Listed]:
    """All builds under a folder, the one worked on last first."""
    return [look_at(root) for root in build_roots(artifacts)]


def look_at(root: Path) -> Listed:
    """What is known of one build."""
    build = Build(root)
    spec = spec_of(build)
    record = build.record(DOWNLOAD)
    source = None
    if spec is not None and spec.source.folder is not None:
        source = Path(spec.source.folder)
    elif (build.source / "config.json").is_symlink():
        source = (build.source / "config.json").resolve().parent
    done = tuple(stage for stage in KINDS if (root / "records" / f"{stage}.json").is_file())
    is_sample = bool(record and record.facts.is_sample)
    return Listed(root, spec, is_sample, source, done, bool(record and record.facts.streamed))
