"""A name -> a build or an artifact on the disk."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nf4_pipeline.build_folder import Build
from nf4_pipeline.build_folder.spec import SourcePin
from nf4_pipeline.builds.choosing import Chosen, choose, matching
from nf4_pipeline.builds.listing import Listed, list_builds, look_at, recipe_shown
from nf4_pipeline.checkpoint.model_name import SAMPLE, at_revision, beside, is_hub_id
from nf4_pipeline.checkpoint.named_path import named_path
from nf4_pipeline.errors import ArtifactError, BuildError, UsageError
from nf4_pipeline.near_names import near_names
from nf4_pipeline.runtime.artifact import ARTIFACTS, build_roots, is_model, is_quantized

_MOST_SHOWN: Final = 5


@dataclass(frozen=True)
class ChosenArtifact:
    """An artifact that a name means.

    Attributes:
        folder: that holds it.
        build: to which it belongs; None for one that was downloaded or moved.
        note: for people, which one was taken; empty if a path said it.
    """

    folder: Path
    build: Build | None
    note: str = ""


def find_build(
    name: str | Path | None,
    artifacts: Path = ARTIFACTS,
    *,
    newest: bool = False,
    needs: str = "",
) -> Chosen:
    """The build that a name means.

    Args:
        name: a model as `nf4 build` takes it (Hub id, local folder, "sample"), a tag ("calibrated",
            "calibrated-3fa2", "default"), a build folder's name, or the path of a build folder or
            of its export; None for the one worked on last.
        artifacts: the folder that holds builds.
        newest: of several that are meant, take the one worked on last.
        needs: as in `choose`.

    Raises:
        BuildError: there is no such build.
        UsageError: the name can mean several builds, or can be no name.
    """
    if name is not None and (root := _build_at(named_path(name))) is not None:
        return Chosen(look_at(root), named=True)
    found = find_builds(name, artifacts)
    if not found:
        raise no_build(None, artifacts)
    return choose(None if name is None else str(name), found, newest=newest, needs=needs)


def find_builds(name: str | Path | None, artifacts: Path = ARTIFACTS) -> list[Listed]:
    """All builds that a name means, the one worked on last first; for no name, all there are.

    Args:
        name: as in `find_build`.
        artifacts: the folder that holds builds.

    Raises:
        BuildError: there is no such build.
        UsageError: the name can be no name.
    """
    if name is not None and (root := _build_at(named_path(name))) is not None:
        return [look_at(root)]
    listing = list_builds(artifacts)
    found = candidates(name, listing)
    if name is not None and not found:
        raise no_build(name, artifacts, listing)
    return found


def find_artifact(
    name: str | Path, artifacts: Path = ARTIFACTS, *, newest: bool = False
) -> ChosenArtifact | None:
    """The artifact that a name means; None if it is a model of which there is no build.

    Args:
        name: as in `find_build`; also the path of any folder, which is then meant itself unless it
            is the source of a build.
        artifacts: the folder that holds builds.
        newest: of several that are meant, take the one worked on last.

    Raises:
        ArtifactError: the build that is meant has no export.
        UsageError: the name can mean several builds, or can be no name.
    """
    path = named_path(name)
    if (root := _build_at(path)) is not None:
        return _export(Chosen(look_at(root), named=True))
    found = candidates(name, list_builds(artifacts))
    if path.is_dir():
        found = [build for build in found if "serialize" in build.done]
        if not found:
            return ChosenArtifact(path, None)
    if not found:
        return None
    return _export(choose(str(name), found, newest=newest, needs="serialize"))


def find_other(name: str | Path, own: Build, artifacts: Path = ARTIFACTS) -> ChosenArtifact | None:
    """The artifact that another one is compared with: rather one of the same source than any.

    Args:
        name: as in `find_artifact`.
        own: the build that it is compared with, which is not meant itself.
        artifacts: the folder that holds builds.

    Raises:
        ArtifactError: the build that is meant has no export.
        UsageError: the name means `own`, can mean several builds, or can be no name.
    """
    if _build_at(named_path(name)) is None:
        mine = look_at(own.root)
        others = [
            build
            for build in list_builds(artifacts)
            if build.root.resolve() != own.root.resolve() and is_same_source(build, mine)
        ]
        if found := candidates(name, others):
            return _export(choose(str(name), found, newest=False, needs="serialize"))
    chosen = find_artifact(name, artifacts)
    if chosen and chosen.build and chosen.build.root.resolve() == own.root.resolve():
        raise UsageError(f"{name} is the build itself. Name another one to compare it with.")
    return chosen


def is_same_source(one: Listed, other: Listed) -> bool:
    """Whether two builds are of one checkpoint."""
    pins: list[SourcePin] = [build.spec.source for build in (one, other) if build.spec]
    return len(pins) == 2 and pins[0].is_same(pins[1])


def candidates(name: str | Path | None, listing: Sequence[Listed]) -> list[Listed]:
    """The builds of a listing that a name can mean.

    Args:
        name: as in `find_build`, but for paths of builds.
        listing: of builds.
    """
    if name is None:
        return list(listing)
    path = named_path(name)
    return matching(str(name), listing, path.resolve() if path.is_dir() else None)


def _build_at(path: Path) -> Path | None:
    """The build folder that a path means: itself, or the one whose export it is."""
    for root in (path, path.parent if path.name == "export" else path):
        if (root / "records").is_dir():
            return root
    return None


def _export(chosen: Chosen) -> ChosenArtifact:
    root = chosen.listed.root
    if not is_model(root / "export"):
        raise ArtifactError(
            f"{root} is a build without an export. Finish it: {how_to_finish(chosen.listed)}."
        )
    return ChosenArtifact(root / "export", Build(root), chosen.note)


def how_to_finish(build: Listed) -> str:
    """The command that finishes a build, as far as is known of which model it is."""
    words = ["nf4", "build", "MODEL"]
    if build.is_sample:
        words[2] = "sample"
    elif build.spec is not None and build.spec.source.commit is not None:
        words[2:] = [build.spec.source.repo, "--revision", build.spec.source.commit]
    elif build.source is not None and build.source.is_dir():
        words[2] = str(build.source)
    command = shlex.join([*words, "--build-dir", str(build.root)])
    own = recipe_shown(build.variant) if build.variant is not None else ""
    return f"{command}, with the recipe that it was begun with ({own})" if own else command


def why_no_artifact(folder: Path, artifacts: Path = ARTIFACTS) -> ArtifactError | None:
    """The error of a plain checkpoint where an artifact is wanted; None of any other folder.

    Args:
        folder: that was named, and is in no build.
        artifacts: the folder that holds builds.
    """
    if (folder / "manifest.json").exists() or not is_model(folder) or is_quantized(str(folder)):
        return None
    name = folder.resolve().name
    same = [build.root for build in list_builds(artifacts) if build.is_of(name)]
    do = f"A build of that name: {same[0]}" if same else f"Make one: nf4 build {_quoted(folder)}"
    return ArtifactError(f"{folder} is a checkpoint, not an artifact. {do}.")


def _quoted(name: str | Path) -> str:
    return shlex.quote(str(name))


def no_build(
    name: str | Path | None, artifacts: Path = ARTIFACTS, listing: Sequence[Listed] | None = None
) -> BuildError:
    """The error of a name that no build has.

    Args:
        name: as it was given.
        artifacts: the folder that holds builds.
        listing: of them, if it is known.
    """
    known = list_builds(artifacts) if listing is None else listing
    return BuildError(_nothing(name, known, artifacts))


def _nothing(name: str | Path | None, listing: Sequence[Listed], artifacts: Path) -> str:
    """The message for a name that no build has."""
    where = artifacts.absolute()
    if not listing and build_roots(where.parent):
        here = f" The builds lie in {where.parent} itself: go to the folder above it."
    else:
        here = ""
    if name is None:
        return f"There is no build under {where}.{here or ' Start one: nf4 build sample.'}"
    text, path = str(name), named_path(name)
    if (path / "manifest.json").is_file():
        return (
            f"{path} is an artifact that lies in no build, and this needs a build with its records "
            f"and its source. To check an artifact of others: nf4 reproduce {_quoted(path)}."
        )
    said = f"There is no build of {text} under {where}"
    near = _near(text, path, listing)
    if path.is_dir() or text == SAMPLE:
        start = _quoted(text)
    elif is_hub_id(text) and not path.parent.is_dir():
        return _not_on_disk(text, said, near) + here
    else:
        start = "MODEL"
        said = (
            f"There is no build under {where} whose model, tag or folder is {text}; it is no "
            "folder here and no Hub id (ORG/NAME) either"
        )
    if here:
        return f"{said}.{here}"
    if near:
        return f"{said}. Did you mean {near}? Or start one: nf4 build {start}."
    if listing:
        shown = [build.root.name for build in listing[:_MOST_SHOWN]]
        more = ", …" if len(listing) > len(shown) else ""
        said += f". Builds there: {', '.join(shown)}{more}"
    return f"{said}. Start one: nf4 build {start}."


def _not_on_disk(repo: str, said: str, near: str) -> str:
    """The message for a Hub id of which there is no build.

    Args:
        repo: the id, perhaps with a revision behind it.
        said: that there is none.
        near: a name that may have been meant; empty if there is none.
    """
    model, revision = at_revision(repo) or (repo, "")
    at = _quoted(model) + (f" --revision {_quoted(revision)}" if revision else "")
    meant = f" Did you mean {near}?" if near else ""
    return (
        f"{said}.{meant} Start one: nf4 build {at}. If it is an artifact on the Hub, fetch it "
        f"first: hf download {at} --local-dir DIR; then: nf4 reproduce DIR."
    )


def _near(name: str, path: Path, listing: Sequence[Listed]) -> str:
    """A build, a folder, or "sample" that may have been meant; empty if nothing is near.

    A Hub id is near to other ids only, and to few: it says little that two of them end alike.

    Args:
        name: as it was given.
        path: the same as a path.
        listing: of the builds.
    """
    models = {build.spec.source.repo for build in listing if build.spec}
    if path.parent != Path() and path.parent.is_dir():
        found = near_names(path.name, beside(path))
        return str(path.parent / found[0]) if found else ""
    if is_hub_id(name):
        found = near_names(name, filter(is_hub_id, models - {name}), cutoff=0.8)
    else:
        known = {*models, *beside(path)}.union(*(build.names for build in listing))
        found = near_names(name, sorted(known - {name}))
    return found[0] if found else ""
