"""A name -> a build or an artifact on the disk."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nf4_pipeline.build_folder import Build
from nf4_pipeline.build_folder.spec import SourcePin
from nf4_pipeline.builds.absent import ANY_USE, Use, no_build
from nf4_pipeline.builds.choosing import Chosen, choose, matching
from nf4_pipeline.builds.finishing import how_to_finish, missing_weights
from nf4_pipeline.builds.keeping import spec_of
from nf4_pipeline.builds.listing import Listed, list_builds, look_at
from nf4_pipeline.checkpoint.named_path import is_url, local_copy, named_path
from nf4_pipeline.errors import ArtifactError, BuildError, UsageError
from nf4_pipeline.object_store.address import check_url
from nf4_pipeline.records import ATTEST, SERIALIZE, VERIFY
from nf4_pipeline.runtime.artifact import ARTIFACTS, is_model


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
    use: Use = ANY_USE,
) -> Chosen:
    """The build that a name means.

    Args:
        name: a model as `nf4 build` takes it (Hub id, local folder, "sample"), a tag ("calibrated",
            "calibrated-3fa2", "default"), a build folder's name, or the path of a build folder or
            of its export; None for the one worked on last.
        artifacts: the folder that holds builds.
        newest: of several that are meant, take the one worked on last.
        needs: as in `choose`.
        use: what it is wanted for, for messages.

    Raises:
        BuildError: there is no such build.
        UsageError: the name can mean several builds, or can be no name.
    """
    if name is not None and (root := _build_at(name)) is not None:
        return Chosen(look_at(root), named=True)
    found = find_builds(name, artifacts, use)
    if not found:
        raise no_build(None, artifacts, use=use)
    return choose(None if name is None else str(name), found, newest=newest, needs=needs)


def find_builds(
    name: str | Path | None, artifacts: Path = ARTIFACTS, use: Use = ANY_USE
) -> list[Listed]:
    """All builds that a name means, the one worked on last first; for no name, all there are.

    Args:
        name: as in `find_build`.
        artifacts: the folder that holds builds.
        use: as in `find_build`.

    Raises:
        BuildError: there is no such build.
        UsageError: the name can be no name.
    """
    if name is not None and (root := _build_at(name)) is not None:
        return [look_at(root)]
    listing = list_builds(artifacts)
    found = candidates(name, listing)
    if name is not None and not found:
        raise no_build(name, artifacts, listing, use)
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
    if (root := _build_at(name)) is not None:
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
    if _build_at(name) is None:
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


def at_url(url: str) -> Build:
    """The build at a URL, of which what stages left there is taken over into the local copy.

    Raises:
        BuildError: there is no build.
        StoreError: the store refuses or does not answer, or holds something else.
        UsageError: no build can be kept there.
    """
    url = check_url(url)
    build = Build(local_copy(url), url)
    build.pull()
    if spec_of(build) is None:
        raise BuildError(
            f"{url}: there is no build. To start one there: nf4 build MODEL --build-dir "
            f"{shlex.quote(url)}"
        )
    return build


def _build_at(name: str | Path) -> Path | None:
    """The build folder that a name means: itself, or the one whose export it is."""
    path = named_path(name)
    if is_url(name) and path != Path(name):
        return at_url(str(name)).root
    for root in (path, path.parent if path.name == "export" else path):
        if (root / "records").is_dir():
            return root
    return None


def _export(chosen: Chosen) -> ChosenArtifact:
    root = chosen.listed.root
    Build(root).fetch(SERIALIZE, VERIFY, ATTEST)
    if not is_model(root / "export"):
        raise ArtifactError(
            f"{root} is not finished: it is a build without an export. Finish it: "
            f"{how_to_finish(chosen.listed)}"
        )
    if Build(root).only_sent(SERIALIZE):
        raise ArtifactError(
            f"{root}: its weights are in {Build(root).sent.url} alone, where --stream-output sent "
            "them. Name that repo instead, once it is published. To make them here: "
            f"{how_to_finish(chosen.listed)}"
        )
    if missing := missing_weights(root / "export"):
        raise ArtifactError(
            f"{root} is incomplete: {missing[0]} is missing in its export. Make it again: "
            f"{how_to_finish(chosen.listed)}"
        )
    return ChosenArtifact(root / "export", Build(root), chosen.note)
