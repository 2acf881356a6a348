"""What to say of a name that no build and no artifact here has, and which command helps."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nf4_pipeline.builds.finishing import missing_weights
from nf4_pipeline.builds.listing import Listed, list_builds
from nf4_pipeline.checkpoint.model_name import SAMPLE, at_revision, beside, is_hub_id
from nf4_pipeline.checkpoint.named_path import named_path
from nf4_pipeline.checkpoint.named_source import named_source
from nf4_pipeline.errors import ArtifactError, BuildError
from nf4_pipeline.near_names import near_names
from nf4_pipeline.runtime.artifact import ARTIFACTS, build_roots, is_model, is_quantized

_MOST_SHOWN: Final = 5
_ON_ARTIFACTS: Final = {"inspect", "reproduce", "sign", "check", "prompt"}
"""Commands that need no build, only an artifact."""

_NEEDS_BUILD: Final = {
    "verify": "compares a build with its 16-bit source",
    "push": "publishes only what was built and verified here",
}
"""Commands that need a build, and why."""


@dataclass(frozen=True)
class Use:
    """What a build or an artifact is wanted for.

    Attributes:
        command: of `nf4`; empty in a Python program.
        repo_id: where it is to be pushed; empty if that is not known.
        option: that named it, if one did.
    """

    command: str = ""
    repo_id: str = ""
    option: str = ""

    @property
    def why_a_build(self) -> str:
        """Why an artifact alone will not do, to stand behind a comma; empty if that is not said."""
        why = _NEEDS_BUILD.get(self.command)
        return f", and `nf4 {self.command}` {why}" if why else ""

    def typed(self, name: str) -> str:
        """The command for another name."""
        to = f" --repo-id {_quoted(self.repo_id)}" if self.repo_id else ""
        return f"nf4 {self.command} {_quoted(name)}{to}"


ANY_USE: Final = Use()
"""Where nobody says what it is wanted for."""


def why_no_artifact(
    folder: Path, artifacts: Path = ARTIFACTS, use: Use = ANY_USE
) -> ArtifactError | None:
    """The error of a plain checkpoint where an artifact is wanted; None of any other folder.

    Args:
        folder: that was named, and is in no build.
        artifacts: the folder that holds builds.
        use: what it is wanted for.
    """
    if (folder / "manifest.json").exists() or not is_model(folder) or is_quantized(str(folder)):
        return None
    if use.option == "--against":
        return ArtifactError(
            f"--against {folder}: that is a 16-bit model; expected another 4-bit build of the same "
            "model. `nf4 verify` compares with the 16-bit model anyway: leave --against out. `nf4 "
            "status` lists builds."
        )
    real = folder.resolve()
    same = [b for b in list_builds(artifacts) if b.is_of_folder(real) or b.is_of(real.name)]
    exports = [(build, build.root / "export") for build in same if "serialize" in build.done]
    done = [build for build, path in exports if is_model(path) and not missing_weights(path)]
    if done:
        name = str(done[0].root)
        do = f"Name its 4-bit build: {use.typed(name) if use.command else name}"
    else:
        do = f"Build it: nf4 build {_quoted(folder)}"
    return ArtifactError(f"{folder} is a checkpoint, not an artifact: a 16-bit model. {do}")


def no_build(
    name: str | Path | None,
    artifacts: Path = ARTIFACTS,
    listing: Sequence[Listed] | None = None,
    use: Use = ANY_USE,
) -> BuildError:
    """The error of a name that no build has.

    Args:
        name: as it was given.
        artifacts: the folder that holds builds.
        listing: of them, if it is known.
        use: what it is wanted for.
    """
    known = list_builds(artifacts) if listing is None else listing
    where = artifacts.absolute()
    elsewhere = "" if known else _elsewhere(where)
    if name is None:
        said = f"There is no build under {where}."
        return BuildError(f"{said}{elsewhere or ' Start one: nf4 build sample'}")
    return BuildError(_nothing(str(name), named_path(name), known, where, elsewhere, use))


def _nothing(
    text: str, path: Path, listing: Sequence[Listed], where: Path, elsewhere: str, use: Use
) -> str:
    """The message for a name that no build has."""
    if (path / "manifest.json").is_file():
        return _not_built_here(path, use)
    if path.is_dir():
        return _no_build_of_folder(text, path, where, elsewhere)
    near = _near(text, path, listing)
    meant = f" Did you mean {near!r}?" if near else ""
    if use.option:
        return f"{use.option} {text!r}: no such build.{meant or _there(listing) or elsewhere}"
    if text == SAMPLE:
        start = elsewhere or " Start one: nf4 build sample"
        return f"There is no build of {text} under {where}.{start}"
    if is_hub_id(text) and not path.parent.is_dir():
        return _not_on_disk(text, meant, use) + elsewhere
    if "/" in text:
        return f"{text}: no such folder.{meant or _there(listing) or elsewhere}"
    said = f"No build, no folder and no Hub id (ORG/NAME) is called {text!r}; looked in {where}."
    if elsewhere:
        return f"{said}{elsewhere}"
    return f"{said}{meant or _there(listing)} To make a build: nf4 build MODEL, such as sample"


def _there(listing: Sequence[Listed]) -> str:
    """The builds that there are, after a space; nothing if there is none."""
    if not listing:
        return ""
    shown = [build.root.name for build in listing[:_MOST_SHOWN]]
    more = ", … (`nf4 status` lists all)" if len(listing) > len(shown) else ""
    return f" Builds there: {', '.join(shown)}{more}."


def _elsewhere(where: Path) -> str:
    """Where builds lie, after a space, if somebody is in the wrong folder.

    Args:
        where: the folder that should hold builds, and holds none.
    """
    if build_roots(where.parent):
        return f" The builds lie in {where.parent} itself: go to the folder above it: cd .."
    for above in where.parent.parents:
        if build_roots(above / where.name):
            return (
                f" nf4 looks in the folder in which it is started, and builds lie in "
                f"{above / where.name}. Go there first: cd {_quoted(above)}"
            )
    return ""


def _not_built_here(path: Path, use: Use) -> str:
    """The message for an artifact that is in no build, where a build is needed."""
    folder = _quoted(path)
    said = f"{path} was not built on this machine{use.why_a_build or ', and this needs a build'}."
    if use.command == "push":
        repo, _ = named_source(path) or ("", None)
        model = repo if is_hub_id(repo) else "MODEL"
        to = _quoted(use.repo_id or "ORG/NAME")
        return (
            f"{said} Upload it as it is: hf upload {to} {folder} . "
            f"Or build it here from its source, and push that: nf4 build {model}"
        )
    return f"{said} To check an artifact of somebody else: nf4 reproduce {folder}"


def _no_build_of_folder(text: str, path: Path, where: Path, elsewhere: str) -> str:
    if not is_model(path):
        return (
            f"{text} holds no build (no records) and no model (no config.json)."
            f"{elsewhere or ' `nf4 status` lists the builds.'}"
        )
    if is_quantized(str(path)):
        return (
            f"{text} was quantized by another program than nf4, and there is no build of it. Start "
            "from the 16-bit model that it was made from; the card of its repository names that."
        )
    start = elsewhere or f" Start one: nf4 build {_quoted(text)}"
    return f"There is no build of {text} under {where}.{start}"


def _not_on_disk(repo: str, meant: str, use: Use) -> str:
    """The message for a Hub id of which there is no build.

    Args:
        repo: the id, perhaps with a revision behind it.
        meant: a question with a name that may have been meant; empty if there is none.
        use: what it is wanted for.
    """
    model, revision = at_revision(repo) or (repo, "")
    at = _quoted(model) + (f" --revision {_quoted(revision)}" if revision else "")
    folder = model.partition("/")[2]
    fetch = f"hf download {at} --local-dir {_quoted(folder)}"
    build = f"If it is a 16-bit model, build it: nf4 build {at}"
    if use.command in _ON_ARTIFACTS:
        then = f"nf4 {use.command} {_quoted(folder)}"
        return (
            f"{repo} is not on this machine.{meant} If it is an artifact on the Hub, fetch it: "
            f"{fetch}; then: {then}. {build}"
        )
    said = f"{repo} was not built here{use.why_a_build}.{meant}"
    if use.command == "push":
        to = _quoted(use.repo_id or "ORG/NAME")
        return (
            f"{said} If it is an artifact on the Hub, copy it as it is: {fetch}; then: hf upload "
            f"{to} {_quoted(folder)} . {build}"
        )
    return (
        f"{said} If it is an artifact on the Hub, check it without a build: {fetch}; then: nf4 "
        f"reproduce {_quoted(folder)}. {build}"
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


def _quoted(name: str | Path) -> str:
    return shlex.quote(str(name))
