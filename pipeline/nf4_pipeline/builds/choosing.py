"""A name -> one of a listing. Nothing here touches the disk; what is ambiguous is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nf4_pipeline.builds.listing import Listed
from nf4_pipeline.errors import UsageError


@dataclass(frozen=True)
class Chosen:
    """A build that a name means.

    Attributes:
        listed: the build.
        named: it was named itself, by its folder or its tag, and not found by its model or its age.
        note: for people, which one was taken; empty if a path said it.
    """

    listed: Listed
    named: bool
    note: str = ""


def matching(name: str, listing: Sequence[Listed], folder: Path | None = None) -> list[Listed]:
    """The builds that a name can mean, in the order of the listing.

    Args:
        name: of a folder, a tag, or a model.
        listing: of builds.
        folder: that the name is, with all links followed, if it is one.
    """
    if exact := [build for build in listing if build.root.name == name]:
        return exact
    called = [
        build
        for build in listing
        if name in build.names
        or (build.is_of_folder(folder) if folder is not None else build.is_of(name))
    ]
    return called or [build for build in listing if build.tag.startswith(f"{name}-")]


def choose(
    name: str | None, candidates: Sequence[Listed], *, newest: bool, needs: str = ""
) -> Chosen:
    """The one that is meant, of those that a name can mean.

    Args:
        name: as it was given; None for no name.
        candidates: at least one, the one worked on last first.
        newest: take that one where there are several.
        needs: the stage that must be done for what is to be done with it, or "recipe" if it must
            have one; those that lack it count only where all do.

    Raises:
        UsageError: the name can mean several builds, and the newest is not simply taken.
    """
    fit = [build for build in candidates if build.has(needs)] or list(candidates)
    first = fit[0]
    named = name is not None and (name in first.names or first.tag.startswith(f"{name}-"))
    if len(fit) == 1:
        return Chosen(first, named, f"build: {first.root}")
    of = f" of {len(fit)} of {name}" if name is not None else f" of {len(fit)}"
    if newest:
        return Chosen(first, named, f"build: {first.root}, worked on last{of}")
    raise UsageError(ambiguous(name, fit))


def ambiguous(name: str | None, fit: Sequence[Listed]) -> str:
    """The message for a name that can mean several builds.

    Args:
        name: as it was given; None for no name.
        fit: the builds that it can mean.
    """
    tags = [build.tag for build in fit]
    short = [
        build.tag if tags.count(build.tag) == 1 and build.tag != name else build.root.name
        for build in fit
    ]
    what = f"{name} can mean" if name is not None else "No build was named, and there are"
    listed = "; ".join(build.shown for build in fit)
    return (
        f"{what} {len(fit)} builds: {listed}. Name the one that is meant, by its tag or its "
        f"folder: {', '.join(short)}."
    )
